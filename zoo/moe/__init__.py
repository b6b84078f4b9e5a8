"""The core Mixture-of-Experts layer, plain torch."""

from zoo.moe.balancing import update_selection_biases
from zoo.moe.dispatch import LocalDispatcher
from zoo.moe.experts import GroupedExperts, ModuleExperts
from zoo.moe.health import Usage, record_usage
from zoo.moe.layer import MoELayer
from zoo.moe.losses import importance_loss, load_balancing_loss, load_loss, z_loss
from zoo.moe.routed import AuxLosses, RoutedModule, collect_aux_losses, routed_modules
from zoo.moe.routers import DenseRouter, NoisyTopKRouter, Router, ThresholdRouter, TopKRouter
from zoo.moe.routing import RoutingOutput

__all__ = [
    "AuxLosses",
    "DenseRouter",
    "GroupedExperts",
    "LocalDispatcher",
    "MoELayer",
    "ModuleExperts",
    "NoisyTopKRouter",
    "RoutedModule",
    "Router",
    "RoutingOutput",
    "ThresholdRouter",
    "TopKRouter",
    "Usage",
    "collect_aux_losses",
    "importance_loss",
    "load_balancing_loss",
    "load_loss",
    "record_usage",
    "routed_modules",
    "update_selection_biases",
    "z_loss",
]
