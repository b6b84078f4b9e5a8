"""Routers around another router: what it reads is carried through depth, through time, or pooled over a sample."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from zoo.moe.routers.base import Router, linear_fp32, require
from zoo.moe.routers.competition import sample_rows
from zoo.moe.routing import RouterInput, RoutingOutput


class WrappedRouter(Router):
    """Base of the routers that decide through an `inner` one, which may be of any kind."""

    def __init__(self, inner: Router) -> None:
        """Take over the sizes of the inner router."""
        super().__init__(inner.num_experts, inner.top_k)
        self.inner = inner
        self.noncausal = inner.noncausal
        self.needs_expert = inner.needs_expert

    @property
    def compares_units(self) -> bool:
        """Whether the inner router does."""
        return self.inner.compares_units


class RecurrentRouter(WrappedRouter):
    """RMoE (Qiu et al. 2024, arXiv 2408.06793): a GRU over depth hands routing information from layer to layer.

    `h = GRU(W x, state)` is what the inner router reads and what `RoutingOutput.state` hands on. All layers share one
    cell: pass the same object to each.
    """

    def __init__(self, inner: Router, input_dim: int, cell: nn.GRUCell, detach: bool = False) -> None:
        """Wrap a router.

        Args:
            inner: Routes the hidden state: its input width is `cell.hidden_size`.
            input_dim: D of the router input.
            cell: The cell, shared by the routers of all layers.
            detach: Whether gradients stop between layers; the paper lets them pass.

        Raises:
            ValueError: `input_dim` is below 1.
        """
        super().__init__(inner)
        require(input_dim >= 1, "input_dim", input_dim, "must be at least 1")
        self.project = nn.Linear(input_dim, cell.input_size, bias=False)
        self.cell = cell
        self.detach = detach

    def route(self, units: RouterInput) -> RoutingOutput:
        """Route T units by `x` `(T, D)` and `state` `(T, hidden)`, zero where none is given."""
        hidden = self.advance(linear_fp32(units.x, self.project.weight), units.state)
        routing = self.inner.route(replace(units, x=hidden, state=None))
        routing.state = hidden
        return routing

    def advance(self, x: Tensor, state: Tensor | None) -> Tensor:
        """One step of the cell in float32: `(T, input_size)` and `(T, hidden_size)` to `(T, hidden_size)`."""
        cell = self.cell
        if state is None:
            state = x.new_zeros(x.shape[0], cell.hidden_size)
        elif self.detach:
            state = state.detach()
        weights = (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
        with torch.autocast(x.device.type, enabled=False):
            return torch.gru_cell(x, state.float(), *(None if weight is None else weight.float() for weight in weights))


class PreGateRouter(WrappedRouter):
    """Read-ME's pre-gating (Cai et al. 2024, arXiv 2410.19123): one decision per token for all layers.

    A small causal network (a GRU here, an attention layer in the paper) reads the sequence before the first layer; its
    output travels to the next layers as `state`. Layers that share one such router, each getting the state of the one
    before, share its decision, so that a server can fetch experts ahead.
    """

    def __init__(self, inner: Router, input_dim: int, hidden_dim: int) -> None:
        """Wrap a router.

        Args:
            inner: Routes what the causal network gives: its input width is `hidden_dim`.
            input_dim: D of the router input.
            hidden_dim: Width of the causal network.

        Raises:
            ValueError: A size is below 1.
        """
        super().__init__(inner)
        require(input_dim >= 1, "input_dim", input_dim, "must be at least 1")
        require(hidden_dim >= 1, "hidden_dim", hidden_dim, "must be at least 1")
        self.network = nn.GRU(input_dim, hidden_dim, batch_first=True)

    @property
    def compares_units(self) -> bool:
        """A unit's routing depends on those before it."""
        return True

    def route(self, units: RouterInput) -> RoutingOutput:
        """Route T units by `x` `(T, D)`, or by the `state` `(T, hidden)` of an earlier layer alone."""
        hidden = self.read(units) if units.state is None else units.state
        routing = self.inner.route(replace(units, x=hidden, state=None))
        routing.state = hidden
        return routing

    def read(self, units: RouterInput) -> Tensor:
        """Run the causal network along each sample: `(T, hidden)`, zero for padding.

        Raises:
            ValueError: It is being exported, and torch exports no recurrent network over lengths that are data.
        """
        if torch.compiler.is_exporting():
            raise ValueError(
                "PreGateRouter: torch.export cannot run its causal network, as the lengths of the samples are data. "
                "Run `read` before, and export the layer with what it gives as `state`."
            )
        rows = sample_rows(units)
        x = units.x.to(next(self.network.parameters()).dtype)
        if not rows.numel():
            return x.new_zeros(x.shape[0], self.network.hidden_size)
        out: Tensor = self.network(nn.functional.pad(x, (0, 0, 0, 1))[rows])[0].flatten(0, 1)
        return out.new_zeros(x.shape[0] + 1, out.shape[1]).index_copy(0, rows.flatten(), out)[:-1]


class PooledRouter(WrappedRouter):
    """One decision per sample (images, sequences): the inner router reads the mean of a sample's real units."""

    def __init__(self, inner: Router) -> None:
        """Wrap a router that routes the means."""
        super().__init__(inner)
        self.noncausal = True

    @property
    def compares_units(self) -> bool:
        """A unit's routing depends on all units of its sample."""
        return True

    def route(self, units: RouterInput) -> RoutingOutput:
        """Route T units by the means of `x` `(T, D)` over their samples; an expert must be allowed for all units."""
        sample, sizes = units.samples()
        x = units.x.float() if units.mask is None else units.x.float() * units.mask[:, None]
        total = x.new_zeros(sizes.shape[0], x.shape[1]).index_add(0, sample, x)
        # By forward, as no expert may be left that all units of a sample may use.
        pooled: RoutingOutput = self.inner(
            total / sizes.clamp(min=1)[:, None],
            mask=sizes > 0,
            sample_index=torch.arange(sizes.shape[0], device=sample.device),
            expert_mask=pooled_mask(units, sample, sizes.shape[0]),
        )
        routing = pooled.take(sample)
        # Padding belongs to a sample too, but is not routed.
        return self.output(
            units,
            routing.expert_index,
            routing.expert_weight,
            logits=routing.router_logits,
            probs=routing.router_probs,
            selected=routing.selected_index,
            **{name: getattr(routing, name) for name in ("noise_std", "noisy_logits", "identity_weight", "num_groups")},
        )


def pooled_mask(units: RouterInput, sample: Tensor, num_samples: int) -> Tensor | None:
    """The experts that every real unit of a sample may use, `(E,)` or `(S, E)`."""
    if units.expert_mask is None or units.expert_mask.ndim == 1:
        return units.expert_mask
    forbidden = ~units.expert_mask
    if units.mask is not None:
        forbidden = forbidden & units.mask[:, None]
    counts = torch.zeros(num_samples, forbidden.shape[1], device=sample.device)
    return counts.index_add_(0, sample, forbidden.float()) == 0
