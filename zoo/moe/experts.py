"""Experts, and the backends that run them on sorted rows.

Both kinds of experts offer the same two calls: `forward(streams, sizes)` on rows sorted by expert, and `forward_all`
on every unit.
"""

import functools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from zoo.errors import UnknownNameError
from zoo.moe.activations import ACTIVATIONS, activate
from zoo.moe.routers.base import require
from zoo.moe.sorted_mm import Plan, Recycled, SortedFeedForward

logger = logging.getLogger(__name__)


class GroupedExperts(nn.Module):
    """E feed-forward experts of one shape, their parameters stacked with experts on dim 0.

    Gated (`down(act(gate(x)) * up(x))`) holds `up_proj` `(E, 2H, D)`, gate rows first; the plain kind
    (`down(act(up(x)))`) holds `(E, H, D)`. `down_proj` is `(E, out, H)`.
    """

    unit_ndims: Sequence[int] = (1,)

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        *,
        out_dim: int | None = None,
        activation: Literal["silu", "gelu", "relu", "tanh", "identity"] = "silu",
        gated: bool = True,
        bias: bool = False,
        backend: str = "auto",
    ) -> None:
        """Build the experts, each drawn independently as `nn.Linear` would be.

        Args:
            num_experts: E.
            dim: D.
            hidden_dim: H.
            out_dim: Width of the output; D if left out.
            activation: Name of the nonlinearity.
            gated: Whether a gate multiplies the hidden units.
            bias: Whether the projections have biases.
            backend: `auto`, or a name in `BACKENDS`.

        Raises:
            UnknownNameError: No activation or backend of that name.
            ValueError: A size is below 1.
        """
        super().__init__()
        for name, size in {"num_experts": num_experts, "dim": dim, "hidden_dim": hidden_dim}.items():
            require(size >= 1, name, size, "must be at least 1")
        if activation not in ACTIVATIONS:
            raise UnknownNameError("activation", activation, ACTIVATIONS)
        if backend not in ("auto", "dense", *BACKENDS):
            raise UnknownNameError("backend", backend, ["auto", "dense", *BACKENDS])
        self.num_experts = num_experts
        self.dim = dim
        self.hidden_dim = hidden_dim
        self.out_dim = out_dim or dim
        self.activation = activation
        self.gated = gated
        self.backend = backend
        width = 2 * hidden_dim if gated else hidden_dim
        self.up_proj = nn.Parameter(torch.empty(num_experts, width, dim))
        self.down_proj = nn.Parameter(torch.empty(num_experts, self.out_dim, hidden_dim))
        self.up_bias = nn.Parameter(torch.empty(num_experts, width)) if bias else None
        self.down_bias = nn.Parameter(torch.empty(num_experts, self.out_dim)) if bias else None
        self.gradient_memory = (Recycled(), Recycled())
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, uniform in +-1/sqrt(fan-in)."""
        for parameter, fan_in in (
            (self.up_proj, self.dim),
            (self.up_bias, self.dim),
            (self.down_proj, self.hidden_dim),
            (self.down_bias, self.hidden_dim),
        ):
            if parameter is not None:
                nn.init.uniform_(parameter, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    def activate(self, hidden: Tensor) -> Tensor:
        """Apply the nonlinearity, and the gate where there is one, to `(..., 2H)` or `(..., H)`."""
        return activate(hidden, self.activation, self.gated)

    def forward(self, streams: Sequence[Tensor], sizes: list[int], unit: Tensor | None = None) -> Tensor:
        """Run each expert on its own rows.

        Args:
            streams: One tensor `(T, D)`.
            sizes: Rows per expert, summing to N.
            unit: `(N,)` the unit of each row, sorted by expert; None if the tensor holds the sorted rows.

        Returns:
            `(N, out)`.
        """
        (x,) = streams
        x = x if unit is None else x.index_select(0, unit)
        return BACKENDS[choose_backend(self, x)].run(self, x, sizes)

    def fused_sum(self, streams: Sequence[Tensor], weight: Tensor, plan: Plan) -> Tensor | None:
        """Run, weigh and add up in one go where the backend can: `(T, out)`, else None.

        Args:
            streams: One tensor `(T, D)`, not sorted.
            weight: `(T, K)`.
            plan: Of the slots.
        """
        (x,) = streams
        if choose_backend(self, x) != "sorted_mm":
            return None
        return sorted_sum(self, x, weight, plan)

    def forward_all(self, streams: Sequence[Tensor]) -> Tensor:
        """Run every expert on every unit: one `(T, D)` to `(T, E, out)`."""
        (x,) = streams
        hidden = torch.einsum("td,ehd->teh", x, self.up_proj.to(x.dtype))
        if self.up_bias is not None:
            hidden = hidden + self.up_bias.to(x.dtype)
        out = torch.einsum("teh,eoh->teo", self.activate(hidden), self.down_proj.to(x.dtype))
        return out if self.down_bias is None else out + self.down_bias.to(x.dtype)

    def forward_equal(self, rows: Tensor) -> Tensor:
        """Run each expert on as many rows of its own, as batched products: `(E, N, D)` to `(E, N, out)`."""
        hidden = torch.einsum("end,ehd->enh", rows, self.up_proj.to(rows.dtype))
        if self.up_bias is not None:
            hidden = hidden + self.up_bias.to(rows.dtype)[:, None]
        out = torch.einsum("enh,eoh->eno", self.activate(hidden), self.down_proj.to(rows.dtype))
        return out if self.down_bias is None else out + self.down_bias.to(rows.dtype)[:, None]

    def extra_repr(self) -> str:
        """Sizes shown by `print(model)`."""
        return (
            f"num_experts={self.num_experts}, dim={self.dim}, hidden_dim={self.hidden_dim}, out_dim={self.out_dim}, "
            f"activation={self.activation}, gated={self.gated}, backend={self.backend}"
        )


class ModuleExperts(nn.Module):
    """Experts of any kind: conv stacks, adapters, whole models, `nn.Identity`; each reads one stream of the input."""

    def __init__(
        self, experts: Sequence[nn.Module], stream: Sequence[int] | None = None, unit_ndims: Sequence[int] = (1,)
    ) -> None:
        """Wrap the modules.

        Args:
            experts: E modules; each maps `(N, *unit)` of its stream to `(N, *out)`, `out` the same for all.
            stream: For each expert the stream it reads, or -1 for the tuple of all streams; None is stream 0 for all.
            unit_ndims: Dimensions of one unit in each stream: `(1,)` for vectors, `(3, 3)` for two streams of images.

        Raises:
            ValueError: There is no expert, or the streams do not fit.
        """
        super().__init__()
        require(len(experts) >= 1, "experts", list(experts), "must hold at least one module")
        stream = [0] * len(experts) if stream is None else list(stream)
        require(len(stream) == len(experts), "stream", stream, f"must name a stream for each of {len(experts)} experts")
        require(
            all(-1 <= index < len(unit_ndims) for index in stream),
            "stream",
            stream,
            f"must be -1 (all) or in 0..{len(unit_ndims) - 1}, as unit_ndims={list(unit_ndims)} has that many streams",
        )
        self.experts = nn.ModuleList(experts)
        self.num_experts = len(experts)
        self.stream = stream
        self.unit_ndims = tuple(unit_ndims)
        self.backend = "auto"

    def run(self, expert: int, streams: Sequence[Tensor], unit: Tensor | None = None) -> Tensor:
        """Run one expert on the stream it reads, on all units or on some `(N,)`."""
        index = self.stream[expert]
        if index == -1:
            out: Tensor = self.experts[expert](tuple(take(stream, unit) for stream in streams))
        else:
            out = self.experts[expert](take(streams[index], unit))
        return out

    def forward(self, streams: Sequence[Tensor], sizes: list[int], unit: Tensor | None = None) -> Tensor:
        """Run each expert on its own rows.

        Args:
            streams: Tensors `(T, *unit)`.
            sizes: Rows per expert, summing to N.
            unit: `(N,)` the unit of each row, sorted by expert; None if the tensors hold the sorted rows.

        Returns:
            `(N, *out)`.
        """
        if unit is None:
            unit = torch.arange(len(streams[0]), device=streams[0].device)
        rows = unit.split(sizes)
        # One expert always runs, so that a batch without work still has the right output shape.
        busy = [expert for expert, size in enumerate(sizes) if size] or [0]
        return torch.cat([self.run(expert, streams, rows[expert]) for expert in busy])

    def fused_sum(self, streams: Sequence[Tensor], weight: Tensor, plan: Plan) -> Tensor | None:
        """Never: modules have no backend that fuses."""
        return None

    def forward_all(self, streams: Sequence[Tensor]) -> Tensor:
        """Run every expert on every unit: `(T, *unit)` per stream to `(T, E, *out)`."""
        return torch.stack([self.run(expert, streams) for expert in range(self.num_experts)], dim=1)


def take(stream: Tensor, unit: Tensor | None) -> Tensor:
    """The rows of some units `(N,)`; the stream itself, not a copy, where these are all units in their order."""
    if unit is None or (len(unit) == len(stream) and torch.equal(unit, torch.arange(len(unit), device=unit.device))):
        return stream
    return stream.index_select(0, unit)


Experts = GroupedExperts | ModuleExperts


@dataclass(frozen=True, slots=True)
class Backend:
    """A way to run `GroupedExperts` on rows sorted by expert.

    Attributes:
        run: `(experts, rows (N, D), sizes) -> (N, out)`.
        obstacle: `(experts, rows) -> ` the reason why it cannot run these, or None.
    """

    run: Callable[[GroupedExperts, Tensor, list[int]], Tensor]
    obstacle: Callable[[GroupedExperts, Tensor], str | None]


def run_loop(experts: GroupedExperts, x: Tensor, sizes: list[int]) -> Tensor:
    """One expert after the other: the reference, for any dtype and device."""
    # unbind, not indexing: the backward of w[e] would write a full-size zero gradient for every expert.
    ups, downs = experts.up_proj.to(x.dtype).unbind(), experts.down_proj.to(x.dtype).unbind()
    up_biases = experts.up_bias.to(x.dtype).unbind() if experts.up_bias is not None else [None] * len(ups)
    down_biases = experts.down_bias.to(x.dtype).unbind() if experts.down_bias is not None else [None] * len(ups)
    outputs = []
    for expert, rows in enumerate(x.split(sizes)):
        if sizes[expert] or not x.shape[0]:
            hidden = experts.activate(nn.functional.linear(rows, ups[expert], up_biases[expert]))
            outputs.append(nn.functional.linear(hidden, downs[expert], down_biases[expert]))
    return torch.cat(outputs)


def run_grouped_mm(experts: GroupedExperts, x: Tensor, sizes: list[int]) -> Tensor:
    """Two calls of torch's grouped matrix product."""
    counts = torch.tensor(sizes, device=x.device)
    ends = counts.cumsum(0, dtype=torch.int32)

    def product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = nn.functional.grouped_mm(rows, weight.to(rows.dtype).transpose(1, 2), offs=ends)
        if out.requires_grad:
            # Its backward refuses gradients with stride 0, which is what `sum().backward()` sends.
            out.register_hook(lambda gradient: gradient.contiguous())
        return out if bias is None else out + bias.to(rows.dtype).repeat_interleave(counts, 0)

    hidden = experts.activate(product(x, experts.up_proj, experts.up_bias))
    return product(hidden, experts.down_proj, experts.down_bias)


def grouped_mm_obstacle(experts: GroupedExperts, x: Tensor) -> str | None:
    """Why `torch.nn.functional.grouped_mm` cannot take these, or None."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it does not take {x.dtype}"
    if x.is_cuda and x.dtype != torch.bfloat16:
        return f"on CUDA it takes bfloat16, not {x.dtype}"
    row_bytes = [size * x.element_size() for size in (experts.dim, experts.hidden_dim, experts.out_dim)]
    if any(size % 16 for size in row_bytes):
        return f"rows must be multiples of 16 bytes, these are {row_bytes}"
    if not x.shape[0]:
        return "there are no rows"
    return None


def sorted_sum(experts: GroupedExperts, x: Tensor, weight: Tensor, plan: Plan) -> Tensor:
    """The autograd function of `sorted_mm` on a unit's slots: `(T, D)` to `(T, out)`."""
    device = x.device.type
    # Under autocast the function sees the low dtype at once: its in-place products do not cast.
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    parameters = [
        None if parameter is None else parameter.to(dtype)
        for parameter in (experts.up_proj, experts.down_proj, experts.up_bias, experts.down_bias)
    ]
    operands = [x.to(dtype), weight.to(dtype), *parameters]
    keep = torch.is_grad_enabled() and any(operand is not None and operand.requires_grad for operand in operands)
    with torch.autocast(device, enabled=False):
        out: Tensor = SortedFeedForward.apply(
            *operands, plan, experts.activation, experts.gated, keep, experts.gradient_memory
        )
    return out


def run_sorted_mm(experts: GroupedExperts, x: Tensor, sizes: list[int]) -> Tensor:
    """`sorted_mm` without anything to add up: every row is its own unit, with weight 1."""
    row = torch.arange(len(x), device=x.device)
    return sorted_sum(experts, x, x.new_ones(len(x), 1), Plan(row, row, sizes, (len(x), 1)))


BACKENDS: dict[str, Backend] = {
    "loop": Backend(run_loop, lambda experts, x: None),
    "sorted_mm": Backend(run_sorted_mm, lambda experts, x: None),
    "grouped_mm": Backend(run_grouped_mm, grouped_mm_obstacle),
}


@functools.cache
def log_once(message: str) -> None:
    """Log a message the first time it comes up in a process."""
    logger.info(message)


def choose_backend(experts: GroupedExperts, x: Tensor) -> str:
    """The backend for these rows; each choice and its reason is logged once.

    Raises:
        ValueError: The backend that was asked for by name cannot run these rows.
    """
    if experts.backend != "auto":
        obstacle = BACKENDS[experts.backend].obstacle(experts, x)
        if obstacle and x.shape[0]:
            raise ValueError(f"backend={experts.backend!r}: {obstacle}. Use backend='loop' or 'auto'.")
        return "loop" if obstacle else experts.backend
    obstacle = None if x.is_cuda else "it is slower than sorted_mm on a CPU (benchmarks/moe_layer.py)"
    obstacle = obstacle or grouped_mm_obstacle(experts, x)
    choice, reason = ("sorted_mm", f"not grouped_mm, as {obstacle}") if obstacle else ("grouped_mm", "rows lie on CUDA")
    log_once(f"MoE backend {choice} ({reason})")
    return choice


def runs_dense(experts: Experts) -> bool:
    """Whether the layer must run all experts on all units: asked for, or being exported, where sorting cannot go."""
    return experts.backend == "dense" or torch.compiler.is_exporting()
