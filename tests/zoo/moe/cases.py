"""One or more configurations of every router, as plain data: D = 8, E = 4, twelve token ids."""

from torch import nn

from zoo.moe import Router, build_router

TOPK = {"name": "TopKRouter", "input_dim": 8, "num_experts": 4, "top_k": 2}
HIDDEN = {**TOPK, "input_dim": 6}
LEARNED = {"input_dim": 8, "num_experts": 4}
CAPACITY = {**TOPK, "capacity_factor": 0.75, "eval_capacity_factor": 1.0}

CASES: dict[str, dict[str, object]] = {
    "softmax": TOPK,
    "switch": {**TOPK, "top_k": 1, "normalize": False, "jitter": 0.1},
    "topk_then_softmax": {**TOPK, "top_k": 3, "order": "topk_then_softmax"},
    "sigmoid_bias_groups": {
        **TOPK,
        "score": "sigmoid",
        "selection_bias": True,
        "num_groups": 2,
        "top_groups": 1,
        "scale": 2.0,
    },
    "min_per_group": {**TOPK, "num_groups": 2, "min_per_group": 1},
    "gshard": {**TOPK, "random_second": True, "capacity_factor": 1.25, "drop_policy": "position"},
    "capacity_probs": {**CAPACITY, "drop_policy": "probs"},
    "capacity_position": {**CAPACITY, "drop_policy": "position"},
    "noisy": {"name": "NoisyTopKRouter", **LEARNED, "top_k": 2},
    "cosine": {"name": "CosineRouter", **LEARNED, "top_k": 2, "project_dim": 5, "normalize": False},
    "dense": {"name": "DenseRouter", **LEARNED, "score": "softmax"},
    "top_p": {"name": "TopPRouter", **LEARNED, "p": 0.5},
    "top_p_capped": {"name": "TopPRouter", **LEARNED, "p": 0.9, "max_k": 2},
    "null_zero": {"name": "NullExpertRouter", **LEARNED, "top_k": 3, "num_null": 4},
    "null_identity": {"name": "NullExpertRouter", **LEARNED, "top_k": 3, "num_null": 4, "null_kind": "identity"},
    "dense_to_sparse": {"name": "DenseToSparseRouter", **LEARNED, "temperature": 0.5, "threshold": 0.1},
    "dense_to_sparse_dense_eval": {"name": "DenseToSparseRouter", **LEARNED, "dense_eval": True},
    "expert_choice": {"name": "ExpertChoiceRouter", **LEARNED, "capacity_factor": 1.0},
    "base": {"name": "BaseRouter", **LEARNED},
    "hash": {"name": "HashRouter", "num_experts": 4, "vocab_size": 12, "top_k": 2},
    "hash_gated": {"name": "HashRouter", **LEARNED, "vocab_size": 12},
    "hash_gated_two": {"name": "HashRouter", **LEARNED, "vocab_size": 12, "top_k": 2},
    "stable": {"name": "StableMoERouter", **LEARNED, "vocab_size": 12, "student_dim": 5},
    "stochastic": {"name": "StochasticRouter", "num_experts": 4},
    "recurrent": {"name": "RecurrentRouter", "inner": HIDDEN, "input_dim": 8},
    "recurrent_top_p": {
        "name": "RecurrentRouter",
        "inner": {"name": "TopPRouter", "input_dim": 6, "num_experts": 4},
        "input_dim": 8,
    },
    "pre_gate": {"name": "PreGateRouter", "inner": HIDDEN, "input_dim": 8, "hidden_dim": 6},
    "pooled": {"name": "PooledRouter", "inner": TOPK},
    "pooled_null_identity": {
        "name": "PooledRouter",
        "inner": {"name": "NullExpertRouter", **LEARNED, "top_k": 3, "num_null": 4, "null_kind": "identity"},
    },
    "threshold": {"name": "ThresholdRouter", "input_dim": 8},
}


def make_router(case: str) -> Router:
    """Build a case; a recurrent router gets a cell, which no plain data can share."""
    arguments = dict(CASES[case])
    if arguments["name"] == "RecurrentRouter":
        arguments["cell"] = nn.GRUCell(5, 6)
    return build_router(**arguments)
