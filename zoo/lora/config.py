"""Configurations of the adapters, as PEFT keeps them beside the weights in `adapter_config.json`."""

from dataclasses import dataclass
from typing import Any, Literal

from peft import PeftConfig
from torch import nn

from zoo.lora.allocation import check_allocation, experts_at
from zoo.lora.mixture import LoraMixture
from zoo.lora.peft_types import MOLA, SMORA
from zoo.moe import DenseRouter, TopKRouter
from zoo.moe.routers.base import require

SCORES = ("sigmoid", "softmax", "none")


@dataclass
class MixtureConfig(PeftConfig):
    """What the adapters have in common; the fields that PEFT's own methods have mean what they mean there.

    Attributes:
        target_modules: Names, or a regular expression, of the `nn.Linear` and `Conv1D` modules to adapt, or
            `"all-linear"`; None takes those that PEFT's LoRA has by default for a known architecture.
        exclude_modules: Names, or a regular expression, of modules to leave out.
        layers_to_transform: Indices of the layers to adapt; all if left out.
        layers_pattern: Name of the list of layers that these indices count.
        modules_to_save: Modules that are trained and saved beside the adapter, such as a new head.
        alpha: Scale of what the adapter adds, which is divided by SMoRA's `top_k` or MoLA's `r`, as LoRA's is by `r`.
        dropout: Probability with which what the experts read is dropped.
        aux_losses: Coefficient of each auxiliary loss, by its name in `zoo.moe.losses.LOSSES`; None is the method's.
        init_weights: Whether the adapter adds nothing before it is trained.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    alpha: float = 16
    dropout: float = 0.0
    aux_losses: dict[str, float] | None = None
    init_weights: bool = True

    def __post_init__(self) -> None:
        """Check what needs no network to be checked.

        Raises:
            ValueError: A field is not allowed, or does not fit another.
        """
        super().__post_init__()  # type: ignore[no-untyped-call]
        if self.aux_losses is None:
            self.aux_losses = self.default_losses()
        require(self.alpha > 0, "alpha", self.alpha, "must be positive")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "must be in [0, 1)")
        if isinstance(self.target_modules, str):
            rule = "PEFT does not look at it where target_modules is a string; list their names"
            require(self.layers_to_transform is None, "layers_to_transform", self.layers_to_transform, rule)
        if self.layers_pattern:
            rule = "says what layers_to_transform counts, which is left out"
            require(self.layers_to_transform is not None, "layers_pattern", self.layers_pattern, rule)
        # PEFT looks names up in these.
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)

    def default_losses(self) -> dict[str, float]:
        """Those of the method."""
        return {}

    def build(self, in_features: int, out_features: int, model: nn.Module, key: str) -> LoraMixture:
        """The mixture for one linear layer.

        Args:
            in_features: D.
            out_features: D_out.
            model: The network that it lies in.
            key: Its dotted name there.

        Raises:
            ValueError: The configuration does not fit the network.
        """
        raise NotImplementedError(f"{type(self).__name__} must define build().")

    def options(self) -> dict[str, Any]:
        """The arguments of `LoraMixture` that the fields here give."""
        return {"dropout": self.dropout, "aux_losses": self.aux_losses, "init_weights": self.init_weights}


@dataclass
class SmoraConfig(MixtureConfig):
    """SMoRA (Zhao et al. 2025, arXiv 2501.15103): each rank of one LoRA is an expert.

    `y = W x + alpha / top_k * B (g * A x)`, where the gates g of the `top_k` chosen ranks sum to `top_k`. The load is
    balanced without a loss: biases that count for the choice alone (the released code adds them to the gates too) are
    moved by `zoo.moe.update_selection_biases(model)`, to be called once per optimiser step.

    Attributes:
        r: Ranks.
        top_k: Ranks that one unit uses.
        block_size: Ranks that are chosen together, a divisor of both: 1 is SMoRA, more is a mixture of LoRA experts of
            that rank each.
        score: How the router's logits become gates. `"none"` gives every rank the gate 1 and no router, which is
            PEFT's LoRA; it needs `top_k=r`.
        balance: Whether the choice is biased towards what is chosen too seldom.
    """

    r: int = 64
    top_k: int = 8
    block_size: int = 1
    score: Literal["sigmoid", "softmax", "none"] = "sigmoid"
    balance: bool = True

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ValueError: One is not allowed, or does not fit another.
        """
        super().__post_init__()
        self.peft_type = SMORA
        require(self.r >= 1, "r", self.r, "must be at least 1")
        require(self.block_size >= 1, "block_size", self.block_size, "must be at least 1")
        require(self.score in SCORES, "score", self.score, f"must be one of {', '.join(SCORES)}")
        require(1 <= self.top_k <= self.r, "top_k", self.top_k, f"must be in 1..r={self.r}")
        for name in ("r", "top_k"):
            value = getattr(self, name)
            require(value % self.block_size == 0, name, value, f"must be a multiple of block_size={self.block_size}")
        if self.score == "none":
            require(self.top_k == self.r, "top_k", self.top_k, f"must be r={self.r} for score='none'")
        elif self.top_k == self.block_size:
            rule = "is a single block, whose normalised gate is constant, so the router would not learn; use more"
            require(self.r == self.block_size, "top_k", self.top_k, rule + ", or MolaConfig(top_k=1)")

    def build(self, in_features: int, out_features: int, model: nn.Module, key: str) -> LoraMixture:
        """The mixture for one linear layer; see `MixtureConfig.build`."""
        blocks, active = self.r // self.block_size, self.top_k // self.block_size
        return LoraMixture(
            self.router(in_features, blocks, active),
            in_features,
            out_features,
            rank=self.block_size,
            scaling=self.alpha / self.top_k,
            **self.options(),
        )

    def router(self, in_features: int, blocks: int, active: int) -> DenseRouter | TopKRouter:
        """The router over blocks, whose gates sum to the number of active ones."""
        if self.score == "none" or blocks == 1:
            return DenseRouter(blocks)
        return TopKRouter(in_features, blocks, active, score=self.score, scale=active, selection_bias=self.balance)


@dataclass
class MolaConfig(MixtureConfig):
    """MoLA (Gao et al. 2024, arXiv 2402.08562): LoRA experts, in each layer as many as the allocation says.

    `y = W x + alpha / r * sum_i w_i B_i A_i x` over the `top_k` experts that the softmax of the module's own router
    gives the largest weights, which are made to sum to 1. A single expert per unit keeps its probability as its weight,
    as in Switch, or its router would not learn.

    The paper's balance loss, 0.001 times its sum over 32 layers, is the default coefficient of its mean here. A soft
    mixture has nothing to balance, as every unit uses all experts.

    Attributes:
        r: Ranks of each expert.
        top_k: Experts that one unit uses; None is all of them, a soft mixture.
        experts: Of each module: one number; a pattern for four equal blocks of layers from the input to the output,
            such as the paper's `"2-4-6-8"`, `"8-6-4-2"`, `"8-2-2-8"`, `"5-5-5-5"`; or a list of one number per layer.
        shared_a: Whether one A serves all experts of a module: with `top_k=None` HydraLoRA (Tian et al. 2024, arXiv
            2404.19245).
    """

    r: int = 8
    top_k: int | None = 2
    experts: int | str | list[int] = "2-4-6-8"
    shared_a: bool = False

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ValueError: One is not allowed, or does not fit another.
        """
        super().__post_init__()
        self.peft_type = MOLA
        require(self.r >= 1, "r", self.r, "must be at least 1")
        require(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "must be at least 1, or None for all")
        if self.top_k is None:
            rule = "has no effect where every unit uses all experts (top_k=None)"
            require("load_balancing" not in (self.aux_losses or {}), "aux_losses", self.aux_losses, rule)
        check_allocation(self.experts)

    def default_losses(self) -> dict[str, float]:
        """The paper's balance loss; see the class."""
        return {} if self.top_k is None else {"load_balancing": 0.03}

    def build(self, in_features: int, out_features: int, model: nn.Module, key: str) -> LoraMixture:
        """The mixture for one linear layer; see `MixtureConfig.build`."""
        experts = experts_at(self.experts, model, key)
        return LoraMixture(
            self.router(in_features, experts, key),
            in_features,
            out_features,
            rank=self.r,
            scaling=self.alpha / self.r,
            shared_a=self.shared_a,
            **self.options(),
        )

    def router(self, in_features: int, experts: int, key: str) -> DenseRouter | TopKRouter:
        """The router over experts; a single expert needs none.

        Raises:
            ValueError: There are fewer experts than a unit uses.
        """
        rule = f"is more than the {experts} experts of {key!r}; a soft mixture has top_k=None"
        require(self.top_k is None or self.top_k <= experts, "top_k", self.top_k, rule)
        if experts == 1:
            return DenseRouter(1)
        if self.top_k is None:
            return DenseRouter(experts, in_features, "softmax")
        return TopKRouter(in_features, experts, self.top_k, normalize=self.top_k > 1)
