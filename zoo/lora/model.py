"""The tuners, which PEFT calls to adapt a network, and to save and load what was trained."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from peft import PeftConfig
from peft.tuners.tuners_utils import (
    BaseTuner,
    _filter_state_dict_by_key_prefixes,
    _get_tuner_state_dict_key_prefixes,
)
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from zoo.errors import CheckpointError
from zoo.lora.config import MixtureConfig
from zoo.lora.layer import MixtureLinear, MolaLinear, SmoraLinear
from zoo.lora.padding import PaddingMask

# What is adapted by default, by the base's architecture.
TARGETS = {model: list(names) for model, names in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.items()}


class MixtureModel(BaseTuner):
    """Base of the two methods: replaces linear layers, and hands them the mask of each forward."""

    tuner_layer_cls: type[MixtureLinear]
    target_module_mapping = TARGETS

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        if self.get_model_config(model).get("is_encoder_decoder"):
            raise ValueError(
                f"{type(model).__name__} has an encoder and a decoder, each with its own padding, and a layer cannot "
                "tell whose units it reads. Adapt an encoder or a causal model."
            )
        self.padding = PaddingMask(model)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target if isinstance(target, MixtureLinear) else self.tuner_layer_cls(target, self.padding)
        layer.update_layer(adapter_name, cast(MixtureConfig, peft_config), self.model, current_key)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names: mixtures of LoRA cannot use another adapter for each sample of a batch; run one batch "
                "per adapter after set_adapter()."
            )
        yield

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge constant adapters into the weights, in all layers or in none.

        Args:
            adapter_names: Which; the active ones if left out.
            safe_merge: Whether to check the results.

        Raises:
            ValueError: The gates of one depend on the input.
        """
        self.check_merge(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def check_merge(self, adapter_names: list[str] | None) -> None:
        """Raise a `ValueError` where a layer's adapter cannot be merged."""
        for module in self.model.modules():
            if isinstance(module, MixtureLinear):
                module.check_merge(adapter_names)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self.check_merge(adapter_names)
        super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        self.padding.handles.remove()
        return self.model

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT's own looks for the name at the end, which the parts of a router are too deep for.
        holder = cls.tuner_layer_cls.adapter_layer_names[0]
        return re.sub(rf"\.{holder}\.{re.escape(adapter_name)}\.", f".{holder}.", key)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Put the adapter's name into the keys; what is missing or left over is an error, where PEFT warns.

        Raises:
            CheckpointError: The file does not hold this adapter, the whole of it, and no more.
        """
        state = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        prefixes = _get_tuner_state_dict_key_prefixes(model, adapter_name)
        expected = set(_filter_state_dict_by_key_prefixes(model.state_dict(), prefixes))
        holder = f".{cls.tuner_layer_cls.adapter_layer_names[0]}."
        found = {key for key in state if holder in key}
        if expected != found:
            raise CheckpointError(
                f"The adapter's file does not fit its configuration and this model. Missing: "
                f"{shown(expected - found)}. Left over: {shown(found - expected)}."
            )
        return state


def shown(keys: set[str]) -> str:
    """A few keys in words."""
    names = sorted(keys)
    return (", ".join(names[:4]) + (f", ... ({len(names)} in all)" if len(names) > 4 else "")) or "nothing"


class SmoraModel(MixtureModel):
    """SMoRA in a network; see `zoo.lora.SmoraConfig`."""

    prefix = "smora_"
    tuner_layer_cls = SmoraLinear


class MolaModel(MixtureModel):
    """MoLA in a network; see `zoo.lora.MolaConfig`."""

    prefix = "mola_"
    tuner_layer_cls = MolaLinear
