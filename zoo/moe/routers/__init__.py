"""Routers: each maps router inputs to one `RoutingOutput`."""

from zoo.moe.routers.base import Router
from zoo.moe.routers.dense import DenseRouter
from zoo.moe.routers.threshold import ThresholdRouter
from zoo.moe.routers.topk import NoisyTopKRouter, TopKRouter

__all__ = ["DenseRouter", "NoisyTopKRouter", "Router", "ThresholdRouter", "TopKRouter"]
