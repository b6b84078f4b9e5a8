"""Mixtures as their papers size them, made of the parts of this package."""

from collections.abc import Mapping, Sequence
from typing import Any

from zoo.moe.experts import GroupedExperts
from zoo.moe.feed_forward import FeedForward
from zoo.moe.layer import MoELayer
from zoo.moe.routers import TopKRouter
from zoo.moe.routers.base import require


def deepseek_moe(
    dim: int,
    hidden_dim: int,
    num_experts: int,
    top_k: int,
    *,
    segments: int = 1,
    num_shared: int = 0,
    num_groups: int = 1,
    normalize: bool = False,
    aux_losses: Mapping[str, float] | None = None,
    **expert_options: Any,
) -> MoELayer:
    """DeepSeekMoE (Dai et al. 2024, arXiv 2401.06066): fine-grained experts, some of them shared by all units.

    Each of N experts of width H is cut into m, and m times as many are chosen; `num_shared` of these are always on and
    form one dense network. Parameters and active parameters are those of a plain top-K mixture of N experts of width H.

    Args:
        dim: D.
        hidden_dim: H of an uncut expert.
        num_experts: N uncut experts.
        top_k: K uncut experts per unit.
        segments: m, a divisor of H.
        num_shared: How many of the mN small experts are always on; fewer than mK.
        num_groups: Groups (devices) of the routed experts, for the loss `group_balancing`.
        normalize: Whether the routed weights sum to 1; the paper leaves them as they are.
        aux_losses: The paper's expert- and device-level losses are `load_balancing` and `group_balancing`.
        expert_options: Further arguments of `GroupedExperts`, for routed and shared experts.

    Raises:
        ValueError: The numbers do not fit; the message names them.
    """
    require(segments >= 1 and hidden_dim % segments == 0, "segments", segments, f"must divide hidden_dim={hidden_dim}")
    chosen = segments * top_k
    require(0 <= num_shared < chosen, "num_shared", num_shared, f"must be in 0..{chosen - 1}, as {chosen} are chosen")
    width = hidden_dim // segments
    routed = segments * num_experts - num_shared
    backend = expert_options.pop("backend", "auto")
    return MoELayer(
        TopKRouter(dim, routed, chosen - num_shared, normalize=normalize, num_groups=num_groups),
        GroupedExperts(routed, dim, width, backend=backend, **expert_options),
        shared_experts=FeedForward(dim, num_shared * width, **expert_options) if num_shared else None,
        aux_losses=aux_losses,
    )


def per_layer(values: int | Sequence[int], num_layers: int) -> list[int]:
    """One number per layer, e.g. of experts: the same everywhere, or as listed.

    DeepSpeed-MoE's pyramid (Rajbhandari et al. 2022, arXiv 2201.05596) lists more experts for later layers.

    Args:
        values: One number, or one for each layer.
        num_layers: Length of the result.

    Raises:
        ValueError: The list has another length.
    """
    if isinstance(values, int):
        return [values] * num_layers
    require(len(values) == num_layers, "values", list(values), f"must hold one number for each of {num_layers} layers")
    return list(values)
