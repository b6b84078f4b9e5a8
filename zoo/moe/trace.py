"""A record of every decision, for tools that read it later: merging, pruning, placing, steering, unlearning."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from zoo.moe.observe import observe_model
from zoo.moe.routing import RoutingOutput, membership

FORMAT = 1
TENSORS = ("expert_index", "expert_weight", "router_logits", "sample_index", "identity_weight")


@dataclass(slots=True)
class LayerTrace:
    """The decisions of one layer for N real units; padding is left out.

    Attributes:
        expert_index: `(N, K)` int64 in `0..E`, E for an empty slot.
        expert_weight: `(N, K)` float32.
        router_logits: `(N, E')` float32.
        sample_index: `(N,)` int64, samples numbered through all forwards.
        num_experts: E.
        identity_weight: `(N,)` float32 weight of the unit itself (identity null experts), or None.
    """

    expert_index: Tensor
    expert_weight: Tensor
    router_logits: Tensor
    sample_index: Tensor
    num_experts: int
    identity_weight: Tensor | None = None

    @classmethod
    def of(cls, routing: RoutingOutput, first_sample: int) -> "LayerTrace":
        """The real units of one forward, whose samples are numbered from `first_sample`."""
        rows = routing.router_logits.shape[0]
        real = torch.ones(rows, dtype=torch.bool) if routing.mask is None else routing.mask.cpu()
        sample = torch.arange(rows) if routing.sample_index is None else routing.sample_index.cpu()
        identity = routing.identity_weight
        return cls(
            routing.expert_index.cpu()[real],
            routing.expert_weight.detach().float().cpu()[real],
            routing.router_logits.detach().float().cpu()[real],
            sample[real] + first_sample,
            routing.num_experts,
            None if identity is None else identity.detach().float().cpu()[real],
        )

    @classmethod
    def join(cls, parts: Sequence["LayerTrace"]) -> "LayerTrace":
        """One after the other; slots that a forward did not have are empty."""
        slots, experts = max(part.expert_index.shape[1] for part in parts), parts[0].num_experts

        def widen(values: Tensor, empty: int) -> Tensor:
            return nn.functional.pad(values, (0, slots - values.shape[1]), value=empty)

        def identity(part: LayerTrace) -> Tensor:
            return torch.zeros(len(part.sample_index)) if part.identity_weight is None else part.identity_weight

        has_identity = any(part.identity_weight is not None for part in parts)
        return cls(
            torch.cat([widen(part.expert_index, experts) for part in parts]),
            torch.cat([widen(part.expert_weight, 0) for part in parts]),
            torch.cat([part.router_logits for part in parts]),
            torch.cat([part.sample_index for part in parts]),
            experts,
            torch.cat([identity(part) for part in parts]) if has_identity else None,
        )

    def routing(self) -> RoutingOutput:
        """The decisions as forced routing: `layer(x, routing=trace["layer"].routing())`."""
        probs = torch.softmax(self.router_logits, dim=1)
        selected = self.expert_index.masked_fill(self.expert_index == self.num_experts, probs.shape[1])
        return RoutingOutput(
            self.expert_index,
            self.expert_weight,
            selected,
            self.router_logits,
            probs,
            self.num_experts,
            sample_index=self.sample_index,
            identity_weight=self.identity_weight,
        )

    def load_by_label(self, labels: Tensor) -> Tensor:
        """Where each domain or class goes: share of its filled slots per expert, `(labels, E)`, rows summing to 1.

        Args:
            labels: Integers from 0, one per unit `(N,)` or one per sample.

        Raises:
            ValueError: There are fewer labels than samples.
        """
        if labels.shape[0] != self.sample_index.shape[0]:
            samples = int(self.sample_index.max()) + 1 if self.sample_index.numel() else 0
            if labels.shape[0] < samples:
                raise ValueError(
                    f"labels has {labels.shape[0]} entries; expected one for each of {self.sample_index.shape[0]} "
                    f"units or of {samples} samples."
                )
            labels = labels[self.sample_index]
        of_label = nn.functional.one_hot(labels).float()
        counts = of_label.T @ membership(self.expert_index, self.num_experts)
        return counts / counts.sum(1, keepdim=True).clamp(min=1.0)

    def transitions(self, later: "LayerTrace") -> Tensor:
        """How many units visit expert i here and expert j in a later layer, `(E, E of the later layer)`."""
        here, there = membership(self.expert_index, self.num_experts), later.expert_index
        return here.T @ membership(there, later.num_experts)


class RoutingTrace:
    """The decisions of all layers of a model, by layer name: `trace["blocks.3.moe"]`."""

    def __init__(self) -> None:
        """Start empty."""
        self._parts: dict[str, list[LayerTrace]] = {}
        self._samples: dict[str, int] = {}

    @property
    def names(self) -> list[str]:
        """The layers that have routed something, in the order of the model."""
        return [name for name, parts in self._parts.items() if parts]

    def __getitem__(self, name: str) -> LayerTrace:
        if not self._parts.get(name):
            raise KeyError(
                f"No layer {name!r} in this trace; it holds {', '.join(map(repr, self.names)) or 'nothing'}."
            )
        joined = LayerTrace.join(self._parts[name])
        self._parts[name] = [joined]
        return joined

    def add(self, name: str, routing: RoutingOutput) -> None:
        """Append one forward of a layer; its samples are numbered after those of the forwards before."""
        first = self._samples.get(name, 0)
        self._parts.setdefault(name, []).append(LayerTrace.of(routing, first))
        rows = routing.router_logits.shape[0]
        ids = torch.arange(rows) if routing.sample_index is None else routing.sample_index
        self._samples[name] = first + (int(ids.max()) + 1 if ids.numel() else 0)

    def save(self, path: str | Path) -> Path:
        """Write all layers to one `.npz` file, which `numpy.load` reads too.

        Raises:
            ValueError: The path has another suffix.
        """
        path = Path(path)
        if path.suffix != ".npz":
            raise ValueError(f"path={str(path)!r}: must end in .npz.")
        arrays = {"format": np.array(FORMAT), "names": np.array(self.names, dtype=str)}
        for number, name in enumerate(self.names):
            layer = self[name]
            arrays[f"{number}.num_experts"] = np.array(layer.num_experts)
            tensors = {key: getattr(layer, key) for key in TENSORS}
            arrays |= {f"{number}.{key}": value.numpy() for key, value in tensors.items() if value is not None}
        np.savez_compressed(path, allow_pickle=False, **arrays)
        return path

    @classmethod
    def load(cls, path: str | Path) -> "RoutingTrace":
        """Read what `save` wrote.

        Raises:
            ValueError: The file was written by another format version.
        """
        trace = cls()
        with np.load(path) as arrays:
            found = int(arrays["format"]) if "format" in arrays else None
            if found != FORMAT:
                raise ValueError(f"{path} has trace format {found}; this version reads {FORMAT}.")
            for number, name in enumerate(arrays["names"].tolist()):
                tensors = {
                    key: torch.from_numpy(arrays[f"{number}.{key}"]) for key in TENSORS if f"{number}.{key}" in arrays
                }
                layer = LayerTrace(num_experts=int(arrays[f"{number}.num_experts"]), **tensors)
                trace._parts[name] = [layer]
                trace._samples[name] = int(layer.sample_index.max()) + 1 if layer.sample_index.numel() else 0
        return trace


@contextlib.contextmanager
def record_trace(model: nn.Module) -> Iterator[RoutingTrace]:
    """Record every decision of a model while the block runs.

    Raises:
        ValueError: The model has nothing that routes.
    """
    trace = RoutingTrace()
    handles = observe_model(model, lambda name: lambda routing: trace.add(name, routing))
    try:
        yield trace
    finally:
        handles.remove()
