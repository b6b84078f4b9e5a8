"""The methods of the study, with the coefficients of their papers on our scale (perfect balance = 1)."""

from dataclasses import dataclass, field, replace

from studies.routers.model import Design, coarse, deepseek, dense, fine, mixture, pooled, pre_gate, recurrent, soft

BALANCE = {"load_balancing": 0.01}
# RMoE's 1e-3 is for transformers' form of the loss, which is K = 2 at perfect balance.
WEAK_BALANCE = {"load_balancing": 0.002}
# The reference of the curve over balance batches needs no method of its own: a whole batch is `top2`.
MICRO_BATCH = 4


@dataclass(frozen=True, slots=True)
class Method:
    """One line of the table.

    Attributes:
        design: Builds its mixtures.
        what: In words.
        masked_only: Whether a causal model cannot use it.
        bias_rate: Step of bias balancing; 0 is none.
        consistency: Coefficient of THOR's consistency loss, with two forwards per step; 0 is one forward.
        cooling: Shares of the steps in which a gate's temperature falls, and after which it is sparse (EvoMoE).
        freeze: Share of the steps after which StableMoE's student decides.
        micro_batch: Sequences per forward; 0 is the whole batch.
        window: Sequences over which the balance loss counts; 0 counts each forward by itself.
        retrofit: Share of the steps after which the trained routers get null experts; None is never.
    """

    design: Design = field(repr=False)
    what: str
    masked_only: bool = False
    bias_rate: float = 0.0
    consistency: float = 0.0
    cooling: tuple[float, float] | None = None
    freeze: float | None = None
    micro_batch: int = 0
    window: int = 0
    retrofit: float | None = None


def top_k(aux: dict[str, float] | None = None, width: float = 1.0, **options: object) -> Design:
    """The top two of fine experts, the reference of most comparisons."""
    return mixture("TopKRouter", fine, aux, width, top_k=2, **options)


TOP2 = Method(top_k(BALANCE), "top-2, softmax, linear router")
GSHARD = {"random_second": True, "capacity_factor": 1.25, "drop_policy": "position"}
BALANCED_TABLE = {
    "table": "balanced",
    "vocab_size": lambda sizes: sizes.vocab_size,
    "frequencies": lambda sizes: sizes.frequencies,
}

METHODS: dict[str, Method] = {
    "dense-active": Method(dense("active"), "dense twin of equal active size"),
    "dense-total": Method(dense("total"), "dense twin of equal total size"),
    "switch": Method(
        mixture(
            "TopKRouter",
            coarse,
            BALANCE,
            top_k=1,
            normalize=False,
            jitter=0.01,
            capacity_factor=1.25,
            drop_policy="position",
        ),
        "Switch Transformer: top-1, capacity 1.25",
    ),
    "top2": TOP2,
    "top2-weak": replace(TOP2, design=top_k(WEAK_BALANCE), what="top2 with RMoE's coefficient"),
    "gshard": Method(top_k(BALANCE, **GSHARD), "GShard: random second expert, capacity 1.25"),
    "gshard-1.5": Method(top_k(BALANCE, width=1.5, **GSHARD), "GShard with experts 1.5 times as wide"),
    "sigmoid-bias": Method(
        top_k({"sequence_balancing": 1e-4}, score="sigmoid", selection_bias=True),
        "DeepSeek-V3: sigmoid scores, bias balancing",
        bias_rate=1e-3,
    ),
    "noisy": Method(
        mixture("NoisyTopKRouter", fine, {"importance": 0.1, "load": 0.1}, top_k=2), "Shazeer: noisy top-2"
    ),
    "cosine": Method(mixture("CosineRouter", fine, BALANCE, top_k=2), "X-MoE: cosine router"),
    "top-p": Method(
        mixture("TopPRouter", fine, {**BALANCE, "entropy": 1e-4}, p=0.4), "dynamic top-p, p = 0.4, entropy loss"
    ),
    "null": Method(
        mixture("NullExpertRouter", fine, BALANCE, top_k=4, num_null=lambda sizes: 2 * fine(sizes)[0]),
        "AdaMoE: top-4 over experts and twice as many null experts",
    ),
    "null-identity": Method(
        mixture(
            "NullExpertRouter",
            fine,
            BALANCE,
            top_k=4,
            num_null=lambda sizes: 2 * fine(sizes)[0],
            null_kind="identity",
        ),
        "as null, with null experts that give the unit itself",
    ),
    "retrofit-null": replace(
        TOP2, what="AdaMoE: null experts given to a trained top2, for the last 40 % of the steps", retrofit=0.6
    ),
    "recurrent": Method(recurrent(WEAK_BALANCE), "RMoE: recurrent router (compare top2-weak)"),
    "dense-to-sparse": Method(
        mixture("DenseToSparseRouter", coarse), "EvoMoE's gate: from all experts to one", cooling=(0.5, 0.6)
    ),
    "stable": Method(
        mixture(
            "StableMoERouter",
            coarse,
            {**BALANCE, "distillation": 1.0},
            vocab_size=lambda sizes: sizes.vocab_size,
        ),
        "StableMoE: a router learned, distilled and frozen",
        freeze=0.2,
    ),
    "thor": Method(
        mixture("StochasticRouter", coarse, inference="sample"),
        "THOR: random experts, consistency; one random expert per sequence in validation",
        consistency=5.0,
    ),
    "thor-average": Method(
        mixture("StochasticRouter", coarse, inference="all"),
        "THOR with the average of all experts in validation",
        consistency=5.0,
    ),
    "expert-choice": Method(
        mixture("ExpertChoiceRouter", fine, capacity_factor=2.0),
        "experts choose tokens, two per token on average",
        masked_only=True,
    ),
    "hash": Method(mixture("HashRouter", coarse, **BALANCED_TABLE), "hash layers: a balanced table of token ids"),
    "base": Method(mixture("BaseRouter", coarse), "BASE layers: balanced assignment within a sequence"),
    "soft": Method(soft, "Soft MoE: two slots per token", masked_only=True),
    "pooled": Method(pooled(BALANCE), "one top-2 decision per sequence", masked_only=True),
    "pre-gate": Method(pre_gate(BALANCE), "Read-ME: one decision per token for all layers"),
    "fine-grained": Method(deepseek(2, 0, BALANCE), "DeepSeekMoE without shared experts: experts cut in two"),
    "deepseek": Method(deepseek(2, 1, BALANCE), "DeepSeekMoE: experts cut in two, one of them shared"),
    "sequence-lbl": Method(top_k({"sequence_balancing": 0.01}), "top2, balanced in each sequence"),
    "micro-4": replace(TOP2, what="top2, balanced in micro-batches of 4", micro_batch=MICRO_BATCH),
    "global-16": replace(TOP2, what="micro-batches of 4, counts over 16", micro_batch=MICRO_BATCH, window=16),
    "global-64": replace(TOP2, what="micro-batches of 4, counts over 64", micro_batch=MICRO_BATCH, window=64),
}

# Sequences over which the balance loss counts, for the curve: each forward by itself, or a window of several.
BY_FORWARD = {1: "sequence-lbl", 4: "micro-4", 16: "top2"}
BY_WINDOW = {16: "global-16", 64: "global-64"}
