"""A small transformer whose every second feed-forward network may be a mixture, and the mixtures of the study."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from studies.routers.data import MASK
from zoo.moe import FeedForward, GroupedExperts, MoELayer, Router, SoftMoELayer, build_router, deepseek_moe


@dataclass(frozen=True, slots=True)
class Sizes:
    """What all models of a study share.

    Every mixture of top-k routing has `active` hidden units per token and `total` in all, so that the dense twins of
    these two widths are its bounds.

    Attributes:
        vocab_size: Number of token ids.
        length: Tokens per sequence.
        frequencies: How often each token id is read, for hash tables and for the bias of the head.
        causal: Whether a position sees only those before it.
        dim: D.
        layers: Blocks; the second, fourth, ... have the mixtures.
        heads: Of the attention.
        active: Hidden units of the dense twin of equal active size.
        total: Hidden units of the dense twin of equal total size.
    """

    vocab_size: int
    length: int
    frequencies: Sequence[float] = field(repr=False)
    causal: bool
    dim: int = 128
    layers: int = 4
    heads: int = 4
    active: int = 256
    total: int = 1024


# Called once per model, gives what is called once per mixture: routers of several layers may share parts.
Design = Callable[[Sizes], Callable[[], nn.Module]]


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, heads: int, causal: bool) -> None:
        """Build the projections."""
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, L, D)` to the same shape."""
        query, key, value = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class Neighbours(nn.Module):
    """A weighted sum of each token and two near ones: the one on either side, or the two before it.

    Without it a masked model of this size does not leave the unigram plateau within the steps of the study.
    """

    def __init__(self, dim: int, causal: bool) -> None:
        """Build the weights, one for each channel and place."""
        super().__init__()
        self.padding = (0, 0, 2, 0) if causal else (0, 0, 1, 1)
        self.weight = nn.Parameter(torch.full((3, dim), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, L, D)` to the same shape."""
        padded, length = nn.functional.pad(x, self.padding), x.shape[1]
        return sum((self.weight[place] * padded[:, place : place + length] for place in range(3)), torch.zeros(()))


class Block(nn.Module):
    """Neighbours, attention, then a feed-forward network or a mixture, each with a norm before it and a residual."""

    def __init__(self, sizes: Sizes, feed_forward: nn.Module) -> None:
        """Put the parts together."""
        super().__init__()
        self.neighbours_norm = nn.RMSNorm(sizes.dim)
        self.neighbours = Neighbours(sizes.dim, sizes.causal)
        self.attention_norm = nn.RMSNorm(sizes.dim)
        self.attention = Attention(sizes.dim, sizes.heads, sizes.causal)
        self.norm = nn.RMSNorm(sizes.dim)
        self.feed_forward = feed_forward

    def forward(self, x: Tensor, ids: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Map `(B, L, D)` to the same shape, and hand the routers' state on."""
        x = x + self.neighbours(self.neighbours_norm(x))
        x = x + self.attention(self.attention_norm(x))
        units = self.norm(x)
        if isinstance(self.feed_forward, MoELayer):
            out, routing = self.feed_forward(units, token_ids=ids, state=state, return_routing=True)
            return x + out, routing.state
        return x + self.feed_forward(units), state


class LanguageModel(nn.Module):
    """Embeddings, blocks, and a head that starts at the frequencies of the tokens."""

    def __init__(self, sizes: Sizes, design: Design) -> None:
        """Build the model.

        Args:
            sizes: Of everything.
            design: Of the mixtures.
        """
        super().__init__()
        self.tokens = nn.Embedding(sizes.vocab_size, sizes.dim)
        self.positions = nn.Embedding(sizes.length, sizes.dim)
        build = design(sizes)
        parts = [build() if place % 2 else FeedForward(sizes.dim, sizes.active) for place in range(sizes.layers)]
        self.blocks = nn.ModuleList(Block(sizes, part) for part in parts)
        self.norm = nn.RMSNorm(sizes.dim)
        # Read times sqrt(D), tokens have unit variance: smaller ones drown in what attention adds to all tokens alike,
        # and every router starts collapsed.
        self.scale = sizes.dim**0.5
        nn.init.normal_(self.tokens.weight, std=1 / self.scale)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.head = nn.Linear(sizes.dim, sizes.vocab_size)
        nn.init.normal_(self.head.weight, std=0.5 / self.scale)
        counts = torch.tensor(sizes.frequencies)
        counts[MASK] = 0
        self.head.bias.data = ((counts + 1) / (counts + 1).sum()).log()

    def forward(self, ids: Tensor, scored: Tensor) -> Tensor:
        """Logits at the scored positions.

        Args:
            ids: `(B, L)`.
            scored: `(B, L)` bool.

        Returns:
            `(scored.sum(), vocab_size)`.
        """
        x = self.scale * (self.tokens(ids) + self.positions.weight[: ids.shape[1]])
        state = None
        for block in self.blocks:
            x, state = block(x, ids, state)
        logits: Tensor = self.head(self.norm(x[scored]))
        return logits


def dense(width: str) -> Design:
    """A dense twin; `width` names the attribute of `Sizes`."""
    return lambda sizes: lambda: FeedForward(sizes.dim, getattr(sizes, width))


def fine(sizes: Sizes) -> tuple[int, int]:
    """Number and width of experts of which two are active."""
    return 2 * sizes.total // sizes.active, sizes.active // 2


def coarse(sizes: Sizes) -> tuple[int, int]:
    """Number and width of experts of which one is active."""
    return sizes.total // sizes.active, sizes.active


def mixture(
    name: str,
    experts: Callable[[Sizes], tuple[int, int]],
    aux: Mapping[str, float] | None = None,
    width: float = 1.0,
    **options: Any,
) -> Design:
    """A router without ties to other layers.

    Args:
        name: Its class.
        experts: `fine` or `coarse`.
        aux: Coefficients of auxiliary losses.
        width: Factor on the width of the experts.
        options: Further arguments of the router; a function is called with the sizes.
    """

    def design(sizes: Sizes) -> Callable[[], nn.Module]:
        number, hidden = experts(sizes)
        given = {key: value(sizes) if callable(value) else value for key, value in options.items()}
        if name not in ("StochasticRouter", "HashRouter"):
            given["input_dim"] = sizes.dim
        return lambda: layer(sizes, build_router(name, num_experts=number, **given), number, round(width * hidden), aux)

    return design


def layer(sizes: Sizes, router: Router, number: int, hidden: int, aux: Mapping[str, float] | None) -> MoELayer:
    """A mixture of so many experts of this width."""
    return MoELayer(router, GroupedExperts(number, sizes.dim, hidden), aux_losses=aux, causal=sizes.causal)


def recurrent(aux: Mapping[str, float]) -> Design:
    """RMoE over the top two of softmax scores, one cell for all layers; the state is half as wide as the model."""

    def design(sizes: Sizes) -> Callable[[], nn.Module]:
        number, hidden = fine(sizes)
        state = sizes.dim // 2
        cell = nn.GRUCell(state, state)

        def build() -> nn.Module:
            inner = {"name": "TopKRouter", "input_dim": state, "num_experts": number, "top_k": 2}
            router = build_router("RecurrentRouter", inner=inner, input_dim=sizes.dim, cell=cell)
            return layer(sizes, router, number, hidden, aux)

        return build

    return design


def pre_gate(aux: Mapping[str, float]) -> Design:
    """Read-ME: all layers share one router and its first decision."""

    def design(sizes: Sizes) -> Callable[[], nn.Module]:
        number, hidden = fine(sizes)
        state = sizes.dim // 2
        inner = {"name": "TopKRouter", "input_dim": state, "num_experts": number, "top_k": 2}
        router = build_router("PreGateRouter", inner=inner, input_dim=sizes.dim, hidden_dim=state)
        return lambda: layer(sizes, router, number, hidden, aux)

    return design


def pooled(aux: Mapping[str, float]) -> Design:
    """One top-2 decision per sequence."""

    def design(sizes: Sizes) -> Callable[[], nn.Module]:
        number, hidden = fine(sizes)

        def build() -> nn.Module:
            inner = {"name": "TopKRouter", "input_dim": sizes.dim, "num_experts": number, "top_k": 2}
            return layer(sizes, build_router("PooledRouter", inner=inner), number, hidden, aux)

        return build

    return design


def deepseek(segments: int, num_shared: int, aux: Mapping[str, float]) -> Design:
    """Experts cut into segments, some of them shared."""

    def design(sizes: Sizes) -> Callable[[], nn.Module]:
        number, hidden = fine(sizes)
        return lambda: deepseek_moe(
            sizes.dim, hidden, number, 2, segments=segments, num_shared=num_shared, aux_losses=aux
        )

    return design


def soft(sizes: Sizes) -> Callable[[], nn.Module]:
    """Soft MoE with two slots per token, as much work as two experts of that width."""
    number, hidden = fine(sizes)
    slots = max(1, 2 * sizes.length // number)
    return lambda: SoftMoELayer(GroupedExperts(number, sizes.dim, hidden), slots)


def expert_parameters(module: nn.Module) -> int:
    """Parameters of the routed experts of a mixture."""
    experts: Any = getattr(module, "experts", None)
    return 0 if experts is None else sum(parameter.numel() for parameter in experts.parameters())


def parameters(model: nn.Module) -> int:
    """All parameters of a model, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
