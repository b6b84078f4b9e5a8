"""The core Mixture-of-Experts layer, plain torch."""

from zoo.moe.balancing import open_count_windows, update_selection_biases
from zoo.moe.designs import deepseek_moe, per_layer
from zoo.moe.dispatch import LocalDispatcher
from zoo.moe.experts import GroupedExperts, ModuleExperts
from zoo.moe.feed_forward import FeedForward, diversify_experts, split_dense_mlp, upcycle_dense_mlp
from zoo.moe.health import Usage, record_usage
from zoo.moe.layer import MoELayer
from zoo.moe.loads import Dependence, expert_loads, expert_shares, group_dependence
from zoo.moe.losses import (
    consistency_loss,
    consistency_step,
    distillation_loss,
    entropy_loss,
    group_balancing_loss,
    importance_loss,
    load_balancing_loss,
    load_loss,
    sequence_balancing_loss,
    z_loss,
)
from zoo.moe.observe import Handles, observe_model
from zoo.moe.routed import AuxLosses, RoutedModule, collect_aux_losses, routed_modules
from zoo.moe.routers import (
    ROUTERS,
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
    Router,
    StableMoERouter,
    StochasticRouter,
    ThresholdRouter,
    TopKRouter,
    TopPRouter,
    build_router,
)
from zoo.moe.routing import RouterInput, RoutingOutput
from zoo.moe.soft import SoftMoELayer
from zoo.moe.trace import LayerTrace, RoutingTrace, record_trace

__all__ = [
    "ROUTERS",
    "AuxLosses",
    "BaseRouter",
    "CosineRouter",
    "DenseRouter",
    "DenseToSparseRouter",
    "Dependence",
    "ExpertChoiceRouter",
    "FeedForward",
    "GroupedExperts",
    "Handles",
    "HashRouter",
    "LayerTrace",
    "LocalDispatcher",
    "MoELayer",
    "ModuleExperts",
    "NoisyTopKRouter",
    "NullExpertRouter",
    "PooledRouter",
    "PreGateRouter",
    "RecurrentRouter",
    "RoutedModule",
    "Router",
    "RouterInput",
    "RoutingOutput",
    "RoutingTrace",
    "SoftMoELayer",
    "StableMoERouter",
    "StochasticRouter",
    "ThresholdRouter",
    "TopKRouter",
    "TopPRouter",
    "Usage",
    "build_router",
    "collect_aux_losses",
    "consistency_loss",
    "consistency_step",
    "deepseek_moe",
    "distillation_loss",
    "diversify_experts",
    "entropy_loss",
    "expert_loads",
    "expert_shares",
    "group_balancing_loss",
    "group_dependence",
    "importance_loss",
    "load_balancing_loss",
    "load_loss",
    "observe_model",
    "open_count_windows",
    "per_layer",
    "record_trace",
    "record_usage",
    "routed_modules",
    "sequence_balancing_loss",
    "split_dense_mlp",
    "upcycle_dense_mlp",
    "update_selection_biases",
    "z_loss",
]
