"""The layers that take the place of the linear layers of an adapted network."""

from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from zoo.lora.config import MixtureConfig
from zoo.lora.mixture import LoraMixture
from zoo.lora.padding import PaddingMask

# What PEFT would mistake for an adapter's name in the names of our parts, when it saves another adapter.
RESERVED = ("lora_A", "lora_B", "router", "weight", "expert_bias")


class MixtureLinear(nn.Module, BaseTunerLayer):
    """A linear layer with adapters, each of which is a `LoraMixture`; the active ones add up.

    A subclass for each method names the attribute that holds them, as PEFT tells methods apart by these names.

    Attributes:
        base_layer: The adapted layer.
        padding: Knows which units of the network's forward are real.
    """

    def __init__(self, base_layer: nn.Module, padding: PaddingMask) -> None:
        """Wrap a layer; `update_layer` adds adapters."""
        super().__init__()
        self.base_layer = base_layer
        self.padding = padding
        self.in_features, self.out_features = sizes(self.get_base_layer())
        self.merged_adapters = []
        setattr(self, self.adapter_layer_names[0], nn.ModuleDict())

    @property
    def mixtures(self) -> nn.ModuleDict:
        """The adapters by name."""
        return cast(nn.ModuleDict, getattr(self, self.adapter_layer_names[0]))

    def update_layer(self, adapter_name: str, config: MixtureConfig, model: nn.Module, key: str) -> None:
        """Add an adapter; the tuner decides whether it is active and trained.

        Args:
            adapter_name: Its name.
            config: Its configuration.
            model: The network.
            key: Dotted name of this layer there.

        Raises:
            ValueError: The name cannot be saved, or the configuration does not fit the network.
        """
        if adapter_name in RESERVED:
            raise ValueError(f"adapter_name={adapter_name!r}: parts of an adapter have this name; choose another.")
        self.mixtures[adapter_name] = config.build(self.in_features, self.out_features, model, key)
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The linear layer's output of `x` `(*lead, D)`, plus what the active adapters add."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        dtype, mask = result.dtype, self.padding.units(x)
        for mixture in self.mixtures_of(self.active_adapters):
            result = mixture(result, x, mask)
        return result.to(dtype)

    def mixtures_of(self, adapter_names: list[str]) -> list[LoraMixture]:
        """Those of some adapters that adapt this layer."""
        return [cast(LoraMixture, self.mixtures[name]) for name in adapter_names if name in self.mixtures]

    def check_merge(self, adapter_names: list[str] | None = None) -> None:
        """Raise a `ValueError` where an adapter, of the active ones by default, is no constant that can be merged."""
        names = self.active_adapters if adapter_names is None else adapter_names
        if not all(mixture.is_constant for mixture in self.mixtures_of(names)):
            raise ValueError(
                f"Of {', '.join(names)}, not all can be merged: where gates depend on the input, no single weight does "
                "what they do. A single expert can be merged, and SmoraConfig with top_k=r and score='none'."
            )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add constant adapters to the weight.

        Args:
            safe_merge: Whether to check the result first.
            adapter_names: Which; the active ones if left out.

        Raises:
            ValueError: The gates of one depend on the input, or the merged weight is not finite.
        """
        names = check_adapters_to_merge(self, adapter_names)
        self.check_merge(names)
        for name in names:
            if name not in self.mixtures:
                continue
            merged = self.get_base_weight() + self.get_delta_weight(name)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"The merged weight is not finite: adapter {name!r} seems to be broken.")
            self.set_base_weight(merged)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take the merged adapters out of the weight again."""
        while self.merged_adapters:
            self.set_base_weight(self.get_base_weight() - self.get_delta_weight(self.merged_adapters.pop()))

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What a constant adapter adds to the weight, in the weight's shape and dtype."""
        (mixture,) = self.mixtures_of([adapter])
        delta = mixture.delta_weight().detach()
        return (delta.T if isinstance(self.get_base_layer(), Conv1D) else delta).to(self.get_base_weight().dtype)


def sizes(layer: Any) -> tuple[int, int]:
    """Input and output width of a layer that can be adapted.

    Raises:
        ValueError: It cannot be.
    """
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        raise ValueError(
            "target_modules names the out_proj of a torch.nn.MultiheadAttention, which reads its weight and does not "
            "call it, so that an adapter would do nothing: exclude_modules=['out_proj'], or name other modules."
        )
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    raise ValueError(
        f"target_modules names a {type(layer).__name__}; mixtures of LoRA adapt nn.Linear and transformers' Conv1D."
    )


class SmoraLinear(MixtureLinear):
    """A linear layer adapted by SMoRA."""

    adapter_layer_names = ("smora_experts",)


class MolaLinear(MixtureLinear):
    """A linear layer adapted by MoLA."""

    adapter_layer_names = ("mola_experts",)
