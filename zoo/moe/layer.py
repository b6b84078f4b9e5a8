"""The Mixture-of-Experts layer: route, run the experts, combine."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zoo.errors import UnknownNameError
from zoo.moe.combine import COMBINERS, align
from zoo.moe.dispatch import LocalDispatcher, gather_slots
from zoo.moe.experts import Experts, GroupedExperts, runs_dense
from zoo.moe.routed import RoutedModule
from zoo.moe.routers.base import Router, require
from zoo.moe.routing import RoutingOutput


class MoELayer(RoutedModule):
    """A router, E experts and a combiner; `layer(x)` is a drop-in for a feed-forward block.

    Three indirections live here and nowhere else: `expert_mask` (experts that cannot be chosen), `expert_map`
    (router column to stored expert) and forced routing (the argument `routing`).

    Attributes:
        expert_mask: `(E,)` or `(T, E)` bool; set it to forbid experts, None allows all. A unit that may use none is
            padding, unless the router has null experts.
        expert_map: `(E,)` int64, the stored expert behind each router column, or None.
    """

    expert_mask: Tensor | None
    expert_map: Tensor | None

    def __init__(
        self,
        router: Router,
        experts: Experts,
        shared_experts: nn.Module | None = None,
        combine: Literal["sum", "logsumexp", "select", "concat"] = "sum",
        experts_first: bool = False,
        mixer: nn.Module | None = None,
        aux_losses: Mapping[str, float] | None = None,
        expert_map: Sequence[int] | None = None,
        residual: bool = False,
        causal: bool = False,
    ) -> None:
        """Put the parts together.

        Args:
            router: Decides for each unit.
            experts: `GroupedExperts` or `ModuleExperts`.
            shared_experts: Runs on every unit (the input as it came in); its output is added.
            combine: How the K slots of a unit become one output.
            experts_first: Run all experts before the router, which then sees `expert_output` `(T, E, *out)`.
            mixer: With `experts_first`, maps `(T, E, *out)` to the same shape before router and combiner see it.
            aux_losses: Coefficients of auxiliary losses, see `RoutedModule`.
            expert_map: Stored expert behind each router column (merged or moved experts); None is one to one.
            residual: Mix shared and routed output by a learned softmax of the unit instead of adding them
                (DeepSpeed-MoE's residual MoE, Rajbhandari et al. 2022, arXiv 2201.05596); for `GroupedExperts`.
            causal: Whether the model is causal; routers by which a unit sees later ones are then refused.

        Raises:
            UnknownNameError: No combiner or loss of that name.
            ValueError: The parts do not fit together.
        """
        super().__init__(aux_losses)
        if combine not in COMBINERS:
            raise UnknownNameError("combine", combine, COMBINERS)
        require(mixer is None or experts_first, "mixer", type(mixer).__name__, "needs experts_first=True")
        if combine == "select":
            require(router.top_k == 1, "combine", combine, f"takes one slot per unit, the router has {router.top_k}")
        if combine == "concat":
            require(
                router.top_k == router.num_experts,
                "combine",
                combine,
                f"needs all {router.num_experts} experts, the router chooses {router.top_k}; use DenseRouter",
            )
        stored = experts.num_experts
        if expert_map is None:
            require(router.num_experts == stored, "router", f"{router.num_experts} experts", f"but {stored} are stored")
        else:
            require(len(expert_map) == router.num_experts, "expert_map", expert_map, "needs an entry for each column")
            require(
                all(0 <= expert < stored for expert in expert_map),
                "expert_map",
                expert_map,
                f"must be in 0..{stored - 1}",
            )
        require(
            not (causal and router.noncausal),
            "router",
            type(router).__name__,
            "lets a unit see later ones (a TopKRouter does by its eval_capacity_factor), which a causal model must not",
        )
        self.router = router
        self.experts = experts
        self.shared_experts = shared_experts
        self.coefficient = residual_coefficient(experts, shared_experts) if residual else None
        self.combine = combine
        self.experts_first = experts_first
        self.mixer = mixer
        self.dispatcher = LocalDispatcher()
        self.register_buffer("expert_mask", None, persistent=False)
        mapping = None if expert_map is None else torch.tensor(list(expert_map))
        self.register_buffer("expert_map", mapping, persistent=False)

    def forward(
        self,
        x: Tensor | Sequence[Tensor],
        *,
        router_input: Tensor | None = None,
        mask: Tensor | None = None,
        sample_index: Tensor | None = None,
        token_ids: Tensor | None = None,
        state: Tensor | None = None,
        routing: RoutingOutput | None = None,
        return_routing: bool = False,
    ) -> Any:
        """Apply the mixture.

        Args:
            x: `(*lead, *unit)`, or a sequence of streams that share `lead`.
            router_input: `(*lead, D)`; needed where a unit is not a single vector.
            mask: `(*lead)` bool, true for real units.
            sample_index: `(*lead)` int64; by default the index along the first of several leading dimensions, or each
                unit its own sample.
            token_ids: `(*lead)` int64, for routers that look them up.
            state: `(T, ...)` recurrent state from the previous layer's `RoutingOutput.state`.
            routing: A decision to use instead of the router's.
            return_routing: Whether to return the `RoutingOutput` too.

        Returns:
            `(*lead, *out)`, and the `RoutingOutput` if asked for.

        Raises:
            ValueError: Shapes do not fit; the message names them.
        """
        lead, streams = self.flatten(x)
        all_outputs = None
        if self.experts_first or runs_dense(self.experts):
            all_outputs = self.experts.forward_all(streams)
            if self.expert_map is not None:
                all_outputs = all_outputs[:, self.expert_map]
            if self.mixer is not None:
                all_outputs = self.mixer(all_outputs)
        if routing is None:
            routing = self.router(
                self.router_units(lead, streams, router_input),
                mask=flat(mask, lead, "mask"),
                sample_index=self.samples(lead, streams[0], sample_index),
                token_ids=flat(token_ids, lead, "token_ids"),
                state=state,
                expert_output=all_outputs if self.experts_first else None,
                expert_mask=self.expert_mask,
            )
        else:
            self.require_fit(routing, streams[0].shape[0])
        self.record(routing)
        out = self.reduce(streams, all_outputs, routing).unflatten(0, lead)
        if self.shared_experts is not None:
            out = self.add_shared(out, x)
        return (out, routing) if return_routing else out

    def require_fit(self, routing: RoutingOutput, units: int) -> None:
        """Refuse a decision that was made for other experts or other units: it would run without saying so."""
        experts, decided = self.router.num_experts, routing.expert_index.shape[0]
        require(
            routing.num_experts == experts,
            "routing",
            f"{routing.num_experts} experts",
            f"but the router of this layer has {experts}",
        )
        require(decided == units, "routing", f"{decided} units", f"but x has {units}")

    def add_shared(self, out: Tensor, x: Any) -> Tensor:
        """Add the shared experts' output to the routed one `(*lead, *out)`, or mix the two."""
        shared: Tensor = self.shared_experts(x)  # type: ignore[misc]
        if self.coefficient is None:
            return out + shared
        routed_share, shared_share = torch.softmax(self.coefficient(x), dim=-1).unbind(-1)
        return routed_share[..., None] * out + shared_share[..., None] * shared

    def samples(self, lead: torch.Size, like: Tensor, sample_index: Tensor | None) -> Tensor | None:
        """The sample of each unit: as given, else the first of several leading dimensions, else each unit its own."""
        if sample_index is not None:
            return flat(sample_index, lead, "sample_index")
        if len(lead) == 1 and self.router.compares_units:
            raise ValueError(
                f"{type(self.router).__name__} compares the units of a sample, but x has only one leading dimension: "
                "pass sample_index, the sample of each unit."
            )
        first = torch.arange(lead[0], device=like.device)
        return first.view(-1, *[1] * (len(lead) - 1)).expand(lead).reshape(-1)

    def flatten(self, x: Tensor | Sequence[Tensor]) -> tuple[torch.Size, list[Tensor]]:
        """Split off the leading dimensions: `(*lead, *unit)` to `lead` and `(T, *unit)` for every stream."""
        streams = [x] if isinstance(x, Tensor) else list(x)
        ndims = self.experts.unit_ndims
        if len(streams) != len(ndims):
            raise ValueError(f"x has {len(streams)} streams, but the experts read {len(ndims)}.")
        leads = [stream.shape[: stream.ndim - ndim] for stream, ndim in zip(streams, ndims, strict=True)]
        if not leads[0] or any(lead != leads[0] for lead in leads):
            shapes = [tuple(stream.shape) for stream in streams]
            raise ValueError(
                f"x has shapes {shapes}; they must share at least one leading dimension "
                f"before their units of {list(ndims)} dimensions."
            )
        return leads[0], [stream.flatten(0, len(leads[0]) - 1) for stream in streams]

    def router_units(self, lead: torch.Size, streams: list[Tensor], router_input: Tensor | None) -> Tensor:
        """What the router reads, `(T, D)`."""
        if router_input is not None:
            if router_input.shape[:-1] != lead:
                raise ValueError(
                    f"router_input has shape {tuple(router_input.shape)}, expected {tuple(lead)} and one more."
                )
            return router_input.flatten(0, -2)
        if len(streams) > 1 or streams[0].ndim != 2:
            raise ValueError(
                f"Units of shape {[tuple(stream.shape[1:]) for stream in streams]} are not single vectors: "
                "pass router_input, e.g. pooled features."
            )
        return streams[0]

    def reduce(self, streams: list[Tensor], all_outputs: Tensor | None, routing: RoutingOutput) -> Tensor:
        """Run what was chosen, unless it ran already, and combine the slots: `(T, *out)`."""
        routed = self.reduce_experts(streams, all_outputs, routing)
        if routing.identity_weight is None:
            return routed
        if self.combine != "sum" or len(streams) > 1 or routed.shape != streams[0].shape:
            raise ValueError("Identity null experts need combine='sum' and outputs of the shape of the units.")
        return routed + align(routing.identity_weight, routed).to(routed.dtype) * streams[0]

    def reduce_experts(self, streams: list[Tensor], all_outputs: Tensor | None, routing: RoutingOutput) -> Tensor:
        """As `reduce`, without what identity null experts give."""
        if all_outputs is not None:
            return COMBINERS[self.combine](gather_slots(all_outputs, routing.expert_index), routing)
        index = self.stored_index(routing.expert_index)
        if self.combine == "sum":
            return self.dispatcher.weighted_sum(self.experts, streams, index, routing.expert_weight)
        return COMBINERS[self.combine](self.dispatcher.slots(self.experts, streams, index), routing)

    def stored_index(self, index: Tensor) -> Tensor:
        """Router columns to stored experts; empty slots stay empty."""
        if self.expert_map is None:
            return index
        empty = self.expert_map.new_full((1,), self.experts.num_experts)
        return torch.cat([self.expert_map, empty])[index]


def flat(values: Tensor | None, lead: torch.Size, name: str) -> Tensor | None:
    """Flatten a per-unit argument of shape `lead` to `(T,)`.

    Raises:
        ValueError: Its shape is another.
    """
    if values is None:
        return None
    if values.shape != lead:
        raise ValueError(f"{name} has shape {tuple(values.shape)}, expected {tuple(lead)}.")
    return values.reshape(-1)


def residual_coefficient(experts: Experts, shared_experts: nn.Module | None) -> nn.Linear:
    """The map from a unit to the two logits of routed and shared output.

    Raises:
        ValueError: There is no shared expert to mix, or units are not vectors of a known width.
    """
    if shared_experts is None or not isinstance(experts, GroupedExperts):
        raise ValueError("residual=True: needs GroupedExperts and shared_experts.")
    return nn.Linear(experts.dim, 2)
