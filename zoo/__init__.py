"""MoE Zoo: one Mixture-of-Experts layer, the applications built on it, and their checkpoints."""

from zoo.errors import CheckpointError, DataNotFoundError, UnknownNameError
from zoo.hub import Card, ModelInfo, Result, evaluate, info, list_models, load, save, update_metrics, verify

__version__ = "0.1.0"

__all__ = [
    "Card",
    "CheckpointError",
    "DataNotFoundError",
    "ModelInfo",
    "Result",
    "UnknownNameError",
    "evaluate",
    "info",
    "list_models",
    "load",
    "save",
    "update_metrics",
    "verify",
]
