"""Routers: each maps router inputs to one `RoutingOutput`."""

from collections.abc import Mapping
from typing import Any

from zoo.errors import UnknownNameError
from zoo.moe.routers.adaptive import DenseToSparseRouter, NullExpertRouter, TopPRouter
from zoo.moe.routers.balanced import BaseRouter, ExpertChoiceRouter
from zoo.moe.routers.base import Router
from zoo.moe.routers.dense import DenseRouter
from zoo.moe.routers.lookup import HashRouter, StableMoERouter
from zoo.moe.routers.stochastic import StochasticRouter
from zoo.moe.routers.threshold import ThresholdRouter
from zoo.moe.routers.topk import CosineRouter, NoisyTopKRouter, TopKRouter
from zoo.moe.routers.wrappers import PooledRouter, PreGateRouter, RecurrentRouter

ROUTERS: dict[str, type[Router]] = {
    router.__name__: router
    for router in (
        BaseRouter,
        CosineRouter,
        DenseRouter,
        DenseToSparseRouter,
        ExpertChoiceRouter,
        HashRouter,
        NoisyTopKRouter,
        NullExpertRouter,
        PooledRouter,
        PreGateRouter,
        RecurrentRouter,
        StableMoERouter,
        StochasticRouter,
        ThresholdRouter,
        TopKRouter,
        TopPRouter,
    )
}


def build_router(name: str, **arguments: Any) -> Router:
    """Build a router from plain data, as it stands in a configuration.

    `build_router("RecurrentRouter", inner={"name": "TopKRouter", "input_dim": 16, ...}, input_dim=64, cell=cell)`

    Args:
        name: Its class, one of `ROUTERS`.
        arguments: Those of the class; the inner router of a wrapper may be a mapping with its own `name`.

    Raises:
        UnknownNameError: No router of that name.
    """
    if name not in ROUTERS:
        raise UnknownNameError("router", name, ROUTERS)
    inner = arguments.get("inner")
    if isinstance(inner, Mapping):
        arguments["inner"] = build_router(**inner)
    return ROUTERS[name](**arguments)


__all__ = [
    "ROUTERS",
    "BaseRouter",
    "CosineRouter",
    "DenseRouter",
    "DenseToSparseRouter",
    "ExpertChoiceRouter",
    "HashRouter",
    "NoisyTopKRouter",
    "NullExpertRouter",
    "PooledRouter",
    "PreGateRouter",
    "RecurrentRouter",
    "Router",
    "StableMoERouter",
    "StochasticRouter",
    "ThresholdRouter",
    "TopKRouter",
    "TopPRouter",
    "build_router",
]
