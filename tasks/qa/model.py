"""The reader: a pretrained encoder with mixtures of experts, and the two logits of a span for each of its tokens.

Plain torch and transformers. B windows of L tokens; D is the encoder's width, H that of its feed-forward networks.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zoo.base_models import MINILM, AdaptedModel, Freezing, weaker
from zoo.errors import UnknownNameError
from zoo.moe import (
    FeedForward,
    GroupedExperts,
    MoELayer,
    RoutingOutput,
    TopKRouter,
    diversify_experts,
    upcycle_dense_mlp,
)
from zoo.moe.activations import ACTIVATIONS
from zoo.moe.routing import RouterInput

BALANCE = "load_balancing"
INSIDE, HEAD = "inside", "head"
PLACEMENTS = (INSIDE, HEAD)
EXPERTS = ("upcycled", "adapters")

# The projections of the attention in both layouts, and nothing of the feed-forward networks beside it.
ATTENTION = r".*\.attention\.(self\.(query|key|value)|output\.dense|[qkv]_lin|out_lin)"


@dataclass(frozen=True, slots=True)
class Layout:
    """Where an encoder has its layers, and a layer its feed-forward network.

    Attributes:
        layers: Path of the list of layers in the encoder.
        up: Path of the first linear map in a layer.
        act: Of the nonlinearity.
        down: Of the second linear map.
        activation: What the config calls the nonlinearity.
    """

    layers: str
    up: str
    act: str
    down: str
    activation: str

    def feed_forward(self, encoder: Any, layer: int) -> FeedForward:
        """A layer's feed-forward network; it shares the weights."""
        up, down = (encoder.get_submodule(f"{self.layers}.{layer}.{path}") for path in (self.up, self.down))
        return FeedForward.from_linears(up, down, activation=getattr(encoder.config, self.activation))

    def replace(self, encoder: Any, layer: int, mixture: nn.Module) -> str:
        """Put a mixture in its place; dropout, residual connection and normalisation around it stay the layer's own.

        Returns:
            The path of the mixture in the encoder.
        """
        for path, module in ((self.up, mixture), (self.act, nn.Identity()), (self.down, nn.Identity())):
            parent, _, name = f"{self.layers}.{layer}.{path}".rpartition(".")
            setattr(encoder.get_submodule(parent), name, module)
        return f"{self.layers}.{layer}.{self.up}"


LAYOUTS = (
    Layout("encoder.layer", "intermediate.dense", "intermediate.intermediate_act_fn", "output.dense", "hidden_act"),
    Layout("transformer.layer", "ffn.lin1", "ffn.activation", "ffn.lin2", "activation"),
)


@dataclass(frozen=True, slots=True)
class Reading:
    """What a reader makes of a batch of windows.

    Attributes:
        start_logits: `(B, L)`, -inf for padding.
        end_logits: `(B, L)`, likewise.
        routing: What each mixture decided for its T = B * L tokens, window after window, padding included (its slots
            are empty); by the layer's name, `layer 4` (counted from 0) or `head`. A twin has none.
    """

    start_logits: Tensor
    end_logits: Tensor
    routing: dict[str, RoutingOutput]


class QAReader(AdaptedModel):
    """Extractive question answering by a Transformer with mixtures of experts (Zhou et al. 2022, arXiv 2204.09598).

    Called with windows it returns `(start_logits, end_logits)`; `read` tells more. The logits of [CLS] are those of
    "no answer".

    Experts that are copies of a network must leave it as it is at the start, so their weights sum to 1. A single weight
    of 1 would teach the router nothing, and Switch's, its probability, would shrink the network's output to a half:
    with `top_k=1` they are weighed by `StraightThroughRouter`. Adapters start at zero, whatever they are weighed by, so
    that with `top_k=1` they have Switch's weight.
    """

    def __init__(
        self,
        base: str = MINILM,
        base_sha256: str | None = None,
        placement: Literal["inside", "head"] = "inside",
        experts: Literal["upcycled", "adapters"] = "upcycled",
        moe_layers: list[int] | None = None,
        num_experts: int = 4,
        top_k: int = 1,
        expert_dim: int = 64,
        residual: bool = True,
        diversify: float = 0.0,
        balance: float = 0.01,
        capacity_factor: float | None = None,
        jitter: float = 0.0,
        lora_rank: int = 0,
        freeze: Freezing = "embeddings",
        freeze_experts: bool = False,
        freeze_base: bool = False,
        borrowed: Freezing | None = None,
        mixture: bool = True,
    ) -> None:
        """Build the network around its base.

        Args:
            base: The encoder, a folder or a name on the hub: BERT, DistilBERT, or one with the layers of either.
            base_sha256: What its weights must be. None allows any, and is filled in.
            placement: `inside` puts mixtures in place of feed-forward networks of the encoder, `head` puts one behind
                its last layer.
            experts: `upcycled` experts are copies of the layer's feed-forward network (of the last one, for `head`),
                which they replace. `adapters` are narrow experts beside it, whose output starts at zero.
            moe_layers: With `inside`, the layers that get a mixture, from 0; negative ones count from the end. None is
                the last two; `[]` is the plain encoder, with `mixture=False`.
            num_experts: E.
            top_k: K, experts per token.
            expert_dim: Width of an adapter.
            residual: With `head`, whether the mixture's output is added to what it reads (the paper's code replaces
                it).
            diversify: Share of each upcycled expert's weights that is drawn anew, so that experts differ from the
                start; with any, the reader no longer starts as its base.
            balance: Coefficient of the balance loss.
            capacity_factor: An expert takes at most `ceil(tokens * K / E * capacity_factor)` tokens of a window; the
                others, the least probable, pass it by. In training and evaluation alike. None drops nothing.
            jitter: In training what the routers read is multiplied by U(1 - jitter, 1 + jitter).
            lora_rank: Rank of LoRA on the attention's projections in all layers, with `alpha = 2 * rank`; 0 is without.
            freeze: What of the base is not trained. All that is added to it is trained: experts, routers, LoRA, head.
            freeze_experts: A later stage of training: experts stay as they are, routers do not.
            freeze_base: A later stage of training: the encoder stays as it is, LoRA included, mixtures excepted.
            borrowed: What of the base is as it came; see `AdaptedModel`.
            mixture: False builds the twin, with one expert in place of each mixture that is as large as K of them: the
                feed-forward network itself, for K > 1 widened by units whose output starts at zero; or one adapter.

        Raises:
            UnknownNameError: There is no such placement, kind of experts or freezing.
            ValueError: Arguments do not fit each other or the base.
            DataNotFoundError: The base is nowhere.
            CheckpointError: It has other weights.
        """
        super().__init__(base, base_sha256, freeze, borrowed)
        check_arguments(placement, experts, moe_layers, num_experts, top_k, expert_dim, residual, mixture)
        self.placement = placement
        self.experts = experts
        self.moe_layers = moe_layers
        self.num_experts = num_experts
        self.top_k = top_k
        self.expert_dim = expert_dim
        self.residual = residual
        self.diversify = diversify
        self.balance = balance
        self.capacity_factor = capacity_factor
        self.jitter = jitter
        self.lora_rank = lora_rank
        self.freeze_experts = freeze_experts
        self.freeze_base = freeze_base
        self.mixture = mixture
        self.encoder = self.load_base()
        config, of_the_base = self.encoder.config, self.encoder.state_dict(keep_vars=True)
        layout = find_layout(self.encoder, base)
        count = len(self.encoder.get_submodule(layout.layers))
        self.head = None
        if placement == HEAD:
            self.head = self.build_mixture(layout.feed_forward(self.encoder, count - 1), beside=False)
            self.paths = {HEAD: HEAD}
        else:
            self.paths = {}
            for layer in resolve(moe_layers, count):
                mixed = self.build_mixture(layout.feed_forward(self.encoder, layer), beside=experts == "adapters")
                self.paths[f"layer {layer}"] = f"encoder.{layout.replace(self.encoder, layer, mixed)}"
        if lora_rank:
            add_lora(self.encoder, lora_rank)
        self.dropout = nn.Dropout(getattr(config, "qa_dropout", 0.0))
        self.span = nn.Linear(config.hidden_size, 2)
        nn.init.normal_(self.span.weight, std=config.initializer_range)
        nn.init.zeros_(self.span.bias)
        self.set_base(of_the_base)

    def build_mixture(self, dense: FeedForward, beside: bool) -> "Mixture":
        """A mixture, or its twin's one expert.

        Args:
            dense: The feed-forward network that is replaced or accompanied.
            beside: Whether it stays.
        """
        dim = dense.up_proj.in_features
        own = dense if beside else None
        if self.experts == "adapters":
            shape = {"activation": dense.activation, "gated": False}
            if not self.mixture:
                twin = FeedForward(dim, self.top_k * self.expert_dim, **shape)
                nn.init.zeros_(twin.down_proj.weight)
                return Mixture(twin, own)
            experts = GroupedExperts(self.num_experts, dim, self.expert_dim, **shape)
            nn.init.zeros_(experts.down_proj)
        else:
            if not self.mixture:
                return Mixture(widen(dense, self.top_k), own)
            experts = upcycle_dense_mlp(dense, self.num_experts)
            diversify_experts(experts, self.diversify)
        straight = self.experts == "upcycled" and self.top_k == 1
        router = (StraightThroughRouter if straight else TopKRouter)(
            dim,
            self.num_experts,
            self.top_k,
            normalize=self.top_k > 1,
            jitter=self.jitter,
            capacity_factor=self.capacity_factor,
            eval_capacity_factor=self.capacity_factor,
            drop_policy="probs" if self.capacity_factor else None,
        )
        return Mixture(MoELayer(router, experts, aux_losses={BALANCE: self.balance}), own)

    @torch.no_grad()
    def start_from(self, plain: "QAReader") -> None:
        """Take over a trained reader without mixtures: what was copied from the base is copied from its encoder.

        With mixtures inside the encoder this one then computes what that one does (sparse upcycling, Komatsuzaki et al.
        2022, arXiv 2212.05055), if nothing is drawn anew by `diversify`. What that one trained of the base is saved
        with this one, whether or not it is trained further.

        Args:
            plain: Built with `moe_layers=[]` on the same base, without LoRA, as this one is.

        Raises:
            ValueError: It is another reader, or this one has LoRA.
        """
        if plain.paths or plain.lora_rank or self.lora_rank or plain.base_sha256 != self.base_sha256:
            raise ValueError(
                "A mixture starts from a reader that was built with moe_layers=[] on the same base, both without LoRA; "
                f"found mixtures in {list(plain.paths) or 'no layer'}, lora_rank={plain.lora_rank} and "
                f"{self.lora_rank}, bases {plain.base} and {self.base}."
            )
        theirs = plain.encoder.state_dict()
        for name, parameter in self.encoder.named_parameters():
            if name in theirs:
                parameter.copy_(theirs[name])
        self.span.load_state_dict(plain.span.state_dict())
        layout = find_layout(plain.encoder, plain.base)
        count = len(plain.encoder.get_submodule(layout.layers))
        layers = [count - 1] if self.placement == HEAD else resolve(self.moe_layers, count)
        for layer, mixture in zip(layers, self.mixtures().values(), strict=True):
            fresh = self.build_mixture(layout.feed_forward(plain.encoder, layer), mixture.own is not None)
            mixture.load_state_dict(fresh.state_dict())
        self.borrowed = weaker(self.borrowed, plain.borrowed)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, type_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The logits of starts and ends; arguments and errors are those of `read`."""
        with self.tokens(attention_mask.bool()):
            return self.logits(input_ids, attention_mask.bool(), type_ids)

    def read(self, input_ids: Tensor, attention_mask: Tensor, type_ids: Tensor | None = None) -> Reading:
        """Read windows, and say which experts read each token.

        Args:
            input_ids: `(B, L)` int64.
            attention_mask: `(B, L)` bool, or 0 and 1; false is padding.
            type_ids: `(B, L)` int64: 0 for the question, 1 for the context. Encoders without types ignore it.

        Raises:
            ValueError: The windows are longer than the encoder can read.
        """
        routing: dict[str, RoutingOutput] = {}
        with ExitStack() as stack:
            for name, layer in self.mixtures().items():
                if isinstance(layer.experts, MoELayer):
                    handle = layer.experts.observe_routing(lambda found, name=name: routing.update({name: found}))
                    stack.callback(handle.remove)
            return Reading(*self(input_ids, attention_mask, type_ids), routing)

    def logits(self, input_ids: Tensor, mask: Tensor, type_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """As `forward`, when the mixtures know the mask."""
        config = self.encoder.config
        limit = config.max_position_embeddings
        if input_ids.shape[1] > limit:
            raise ValueError(f"The windows have {input_ids.shape[1]} tokens; {self.base} reads at most {limit}.")
        types = {"token_type_ids": type_ids} if getattr(config, "type_vocab_size", 0) > 1 else {}
        hidden = self.encoder(input_ids=input_ids, attention_mask=mask, **types).last_hidden_state
        if self.head is not None:
            hidden = self.head(hidden) + hidden if self.residual else self.head(hidden)
        start, end = self.span(self.dropout(hidden)).masked_fill(~mask[..., None], float("-inf")).unbind(-1)
        return start.contiguous(), end.contiguous()

    def mixtures(self) -> dict[str, "Mixture"]:
        """The mixtures, or what stands for them in a twin, by their names in `Reading.routing`."""
        return {name: self.get_submodule(path) for name, path in self.paths.items()}

    @contextmanager
    def tokens(self, mask: Tensor) -> Iterator[None]:
        """Let the mixtures know which tokens are real; the layers around them do not pass it on."""
        mixtures = self.mixtures().values()
        for mixture in mixtures:
            mixture.mask = mask
        try:
            yield
        finally:
            for mixture in mixtures:
                mixture.mask = None

    def refreeze(
        self, freeze: Freezing | None = None, freeze_experts: bool | None = None, freeze_base: bool | None = None
    ) -> None:
        """Train more or less from now on, e.g. in a second stage; what is None stays as it is.

        Args:
            freeze: As in the constructor.
            freeze_experts: Likewise.
            freeze_base: Likewise.

        Raises:
            UnknownNameError: There is no such freezing.
        """
        self.freeze_experts = self.freeze_experts if freeze_experts is None else freeze_experts
        self.freeze_base = self.freeze_base if freeze_base is None else freeze_base
        super().refreeze(freeze or self.freeze)

    def apply_freezing(self) -> None:
        """Freeze what the three arguments name, and let all else be trained."""
        super().apply_freezing()
        mixtures = self.mixtures().values()
        if self.freeze_base:
            kept = {id(parameter) for mixture in mixtures for parameter in mixture.experts.parameters()}
            for parameter in self.encoder.parameters():
                parameter.requires_grad_(id(parameter) in kept)
        if self.freeze_experts:
            for mixture in mixtures:
                mixture.only_experts.requires_grad_(False)


class Mixture(nn.Module):
    """What takes the place of a feed-forward network: a mixture of experts or its twin's one expert, maybe beside it.

    Attributes:
        mask: `(B, L)` bool, the real tokens of the batch that is being read.
    """

    mask: Tensor | None

    def __init__(self, experts: MoELayer | FeedForward, own: FeedForward | None) -> None:
        """Put the parts together.

        Args:
            experts: The mixture, or the one expert.
            own: The network that stays beside it, or None.
        """
        super().__init__()
        self.experts = experts
        self.own = own
        self.mask = None

    @property
    def only_experts(self) -> nn.Module:
        """The experts, without a router."""
        return self.experts.experts if isinstance(self.experts, MoELayer) else self.experts

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, L, D)` to the same shape."""
        out = self.experts(x, mask=self.mask) if isinstance(self.experts, MoELayer) else self.experts(x)
        return out if self.own is None else self.own(x) + out


class StraightThroughRouter(TopKRouter):
    """Top-k with weights of 1 that still teach the router: the gradient is that of the probability's logarithm.

    The weight is `p / p`, the divisor taken as constant. A probability then rises where a larger output of its expert
    would have lowered the loss, and falls where a smaller one would, as with Switch's weight `p`; Switch's gradient is
    this one times `p`. Nothing answers in the output, but the experts' last layers are trained: they settle where a
    larger or smaller output gains nothing on average, so that the probabilities are not driven one way. The balance
    loss holds them where experts are frozen.
    """

    def route(self, units: RouterInput) -> RoutingOutput:
        """Route T units by `x` `(T, D)`."""
        routing = super().route(units)
        weight = routing.expert_weight
        # Empty slots have weight 0 and keep it.
        return replace(routing, expert_weight=weight / weight.detach().clamp(min=torch.finfo(weight.dtype).tiny))


def find_layout(encoder: Any, name: str) -> Layout:
    """The layout of an encoder.

    Args:
        encoder: A model of transformers.
        name: Its name, for errors.

    Raises:
        ValueError: It has another, or an activation that experts do not have.
    """
    modules = dict(encoder.named_modules())
    layout = next((layout for layout in LAYOUTS if f"{layout.layers}.0.{layout.up}" in modules), None)
    if layout is None:
        raise ValueError(
            f"base={name!r} is a {type(encoder).__name__}: a reader needs an encoder with the layers of BERT (as "
            "RoBERTa and ELECTRA have them) or of DistilBERT."
        )
    activation = getattr(encoder.config, layout.activation)
    if activation not in ACTIVATIONS:
        raise ValueError(f"base={name!r} has the activation {activation!r}; experts can have {', '.join(ACTIVATIONS)}.")
    return layout


def check_arguments(
    placement: str,
    experts: str,
    moe_layers: list[int] | None,
    num_experts: int,
    top_k: int,
    expert_dim: int,
    residual: bool,
    mixture: bool,
) -> None:
    """Refuse arguments that do not fit each other, those of a mixture in a twin too; see `QAReader`."""
    if placement not in PLACEMENTS:
        raise UnknownNameError("placement", placement, PLACEMENTS)
    if experts not in EXPERTS:
        raise UnknownNameError("kind of experts", experts, EXPERTS)
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k={top_k}: must be in 1..num_experts={num_experts}.")
    if expert_dim < 1:
        raise ValueError(f"expert_dim={expert_dim}: must be at least 1.")
    if placement == HEAD and moe_layers is not None:
        raise ValueError(f"moe_layers={moe_layers}: are for placement='inside'; a head stands behind all layers.")
    if moe_layers == [] and mixture:
        raise ValueError("moe_layers=[]: no layer would get a mixture; the plain encoder is with mixture=False.")
    if placement == INSIDE and not residual:
        raise ValueError("residual=False: is for placement='head'; the encoder's layers have connections of their own.")
    if experts == "adapters" and not residual:
        raise ValueError("residual=False: adapters start at zero and would hide the encoder; use experts='upcycled'.")


def resolve(layers: list[int] | None, count: int) -> list[int]:
    """Layers counted from 0; None is the last two.

    Args:
        layers: Negative ones count from the end.
        count: How many layers there are.

    Raises:
        ValueError: There is no such layer, or one is named twice.
    """
    wanted = list(range(max(count - 2, 0), count)) if layers is None else layers
    found = [layer + count if layer < 0 else layer for layer in wanted]
    if len(set(found)) < len(found) or not all(0 <= layer < count for layer in found):
        raise ValueError(f"moe_layers={layers}: name some of the layers {-count}..{count - 1}, each once.")
    return sorted(found)


@torch.no_grad()
def widen(dense: FeedForward, factor: int) -> FeedForward:
    """A copy of a network with `factor` times its hidden units, the further ones with an output of zero at the start.

    Args:
        dense: The network, not gated.
        factor: 1 copies it.
    """
    up, down = dense.up_proj, dense.down_proj
    hidden = up.out_features
    wide = FeedForward(up.in_features, factor * hidden, activation=dense.activation, gated=False, bias=True)
    wide.up_proj.weight[:hidden].copy_(up.weight)
    wide.up_proj.bias[:hidden].copy_(up.bias)
    wide.down_proj.weight.zero_()
    wide.down_proj.weight[:, :hidden].copy_(down.weight)
    wide.down_proj.bias.copy_(down.bias)
    return wide


def add_lora(encoder: nn.Module, rank: int) -> None:
    """Add LoRA to the projections of an encoder's attention, in place.

    Args:
        encoder: A model of transformers.
        rank: Of the update.

    Raises:
        ValueError: It has no such projections.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if not any(re.fullmatch(ATTENTION, name) for name, _ in encoder.named_modules()):
        raise ValueError(
            f"lora_rank={rank}: a {type(encoder).__name__} has no attention projections named as in BERT or "
            "DistilBERT; use lora_rank=0."
        )
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=ATTENTION), encoder)
