"""The methods of the comparison as plain data: reward models on the same frozen base, from the same pairs."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from tasks.reward.capabilities import PREFERENCE_ITSELF
from tasks.reward.groups import HARMLESS

# What `python -m tasks.reward.groups --most 4` prints, mixed groups by their largest category.
GROUPS: dict[str, list[str]] = {
    "Harmlessness": ["Harmlessness"],
    "Open QA": [
        "Brainstorming",
        "Chat",
        "Classification",
        "Generation",
        "Open QA",
        "Rewrite",
        "Role Playing",
        "Summarization",
        "Translation",
    ],
    "Code": ["Closed QA", "Code", "Reasoning"],
    "HH-harmless-base": ["HH-harmless-base"],
}
# And without `--most`.
SIX_GROUPS: dict[str, list[str]] = {
    "Harmlessness": ["Harmlessness"],
    "Translation": [name for name in GROUPS["Open QA"] if name != "Open QA"],
    "HH-harmless-base": ["HH-harmless-base"],
    "Reasoning": ["Closed QA", "Reasoning"],
    "Open QA": ["Open QA"],
    "Code": ["Code"],
}
ONE_GROUP: dict[str, list[str]] = {"all": []}
# What answers are to be.
GOALS: dict[str, list[str]] = {
    "helpful": [name for group in GROUPS.values() for name in group if name not in HARMLESS],
    "harmless": [name for group in GROUPS.values() for name in group if name in HARMLESS],
}
# Of DMoERM, and but for the preference of several objectives: the ten that `python -m studies.reward.properties` keeps.
# The length is not among what that chooses from, as a reward is to be better than it.
CAPABILITIES = [
    PREFERENCE_ITSELF,
    "new_words",
    "prompt_overlap",
    "no_repetition",
    "formatting",
    "emphasis",
    "finished",
    "long_words",
    "first_person",
    "refusal",
    "warning_words",
]
# Of inner models that have experts of their own: what counts in each.
HELPFUL = ["preference", "new_words", "emphasis", "long_words", "prompt_overlap"]
OWN_CAPABILITIES: dict[str, list[str]] = {
    "Harmlessness": ["preference", "new_words", "first_person", "refusal", "warning_words"],
    "Open QA": HELPFUL,
    "Code": HELPFUL,
    "HH-harmless-base": ["preference", "finished", "first_person", "refusal", "new_words"],
}


@dataclass(frozen=True, slots=True)
class Method:
    """One line of the table.

    Attributes:
        what: In words.
        kind: Of `RewardTask`; `judge` learns nothing, `properties` is a regression on what is counted.
        network: Arguments of its class.
        epochs: Of each phase: nothing is chosen among epochs.
        task: Further arguments of `RewardTask`.
        data: Arguments of `StudyData`.
        sampled: Whether it is so slow that it is scored on a sample of the pairs.
        cached: Whether what the frozen layers make of the texts is kept.
    """

    what: str
    kind: Literal["dmoerm", "ensemble", "objectives", "judge", "properties"]
    network: Mapping[str, Any] = field(default_factory=dict)
    epochs: Mapping[str, int] = field(default_factory=dict)
    task: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    sampled: bool = False
    cached: bool = True


# The rates of LoRAs and of heads, how much heads are held to zero, and how often a baseline sees each pair.
RATE, HEAD_RATE, HEAD_DECAY = 1e-3, 3e-3, 0.03
# The other decay that is tried.
LITTLE_DECAY = 0.003
PASSES = 2
# Of DMoERM: epochs of each phase, the share of the pairs of which no LoRA learns what people prefer, the rate of the
# last two phases, which have few weights, and how much the aggregation is held to its start.
EPOCHS = {"router": 3, "joint": 2, "task": 2, "capability": 2, "weigh": 2, "aggregate": 16}
SHARE = 0.1
LAST_RATE, DECAY = 5e-2, 0.3
# Of the gate, which is drawn at random but for its last layer; it is held to its start as much.
GATE_RATE, GATE_EPOCHS = 1e-3, 4
RANK, CAPABILITY_RANK, GENERAL_RANK, GENERAL_MEMBERS = 16, 4, 10, 4
# A DMoERM without a general expert, as large.
NO_GENERAL: dict[str, Any] = {"general_rank": 0, "general_members": 1, "capability_rank": 8}
# At which one LoRA, and one of five, has as many parameters as learn in DMoERM: its expert of the preference does not.
EQUAL_RANK, MEMBER_RANK = 153, 31


def dmoerm(
    what: str,
    epochs: Mapping[str, int] | None = None,
    share: float = SHARE,
    lr: float = RATE,
    last_lr: float = LAST_RATE,
    head_decay: float = HEAD_DECAY,
    **network: Any,
) -> Method:
    """DMoERM with all its parts, but for what is named.

    Args:
        what: In words.
        epochs: Of phases that have others than `EPOCHS`; 0 leaves one out.
        share: Of the pairs of which no LoRA learns what people prefer.
        lr: Learning rate.
        last_lr: That of weighing and aggregation.
        head_decay: Of the task models and the general expert.
        network: Arguments of `DMoERM` that differ.
    """
    counts = {phase: count for phase, count in {**EPOCHS, **(epochs or {})}.items() if count}
    aggregation = {"aggregate": "score", "aggregate_dim": 0, "aggregate_decay": DECAY}
    experts = {"capabilities": CAPABILITIES, "share_capabilities": True, "capability_rank": CAPABILITY_RANK}
    general = {"general_rank": GENERAL_RANK, "general_members": GENERAL_MEMBERS}
    chosen = {"groups": GROUPS, "head_decay": head_decay, **experts, **general, **aggregation, **network}
    last = {phase: last_lr for phase in ("weigh", "aggregate") if phase in counts}
    rates = {"lr": lr, "head_lr": HEAD_RATE, "phase_lr": last}
    return Method(what, "dmoerm", chosen, counts, rates, {"aggregate_share": share})


def single(what: str, rank: int, lr: float = RATE, head_decay: float = HEAD_DECAY) -> Method:
    """One LoRA and a head: the twin.

    Args:
        what: In words.
        rank: Of the LoRA.
        lr: Learning rate.
        head_decay: Of its head.
    """
    network = {"groups": ONE_GROUP, "task_rank": rank, "head_decay": head_decay}
    return Method(
        what, "dmoerm", network, {"joint": PASSES}, {"lr": lr, "head_lr": HEAD_RATE}, {"aggregate_share": 0.0}
    )


def ensemble(what: str, lr: float = RATE, head_decay: float = HEAD_DECAY) -> Method:
    """Five LoRAs, together as large as DMoERM.

    Args:
        what: In words.
        lr: Learning rate.
        head_decay: Of its members' heads.
    """
    network = {"members": 5, "rank": MEMBER_RANK, "head_decay": head_decay}
    return Method(
        what, "ensemble", network, {"members": PASSES}, {"lr": lr, "head_lr": HEAD_RATE}, {"aggregate_share": 0.0}
    )


def objectives(what: str, lr: float = RATE, head_decay: float = HEAD_DECAY) -> Method:
    """One LoRA, as large as DMoERM, with a head for the preference and one for each capability.

    Args:
        what: In words.
        lr: Learning rate.
        head_decay: Of the head for the preference.
    """
    network = {"capabilities": CAPABILITIES[1:], "rank": EQUAL_RANK, "head_decay": head_decay}
    return Method(
        what, "objectives", network, {"objectives": PASSES}, {"lr": lr, "head_lr": HEAD_RATE}, {"aggregate_share": 0.0}
    )


def gate(what: str, lr: float = RATE, head_decay: float = HEAD_DECAY) -> Method:
    """The same with a gate that reads the prompt and weighs the heads, learned from what is held back.

    Args:
        what: In words.
        lr: Learning rate.
        head_decay: Of the head for the preference.
    """
    plain = objectives(what, lr, head_decay)
    epochs = {"objectives": PASSES, "gate": GATE_EPOCHS}
    rates = {**plain.task, "phase_lr": {"gate": GATE_RATE}}
    network = {**plain.network, "gate": True, "gate_decay": DECAY}
    return replace(plain, network=network, epochs=epochs, task=rates, data={"aggregate_share": SHARE})


def flipped(method: Method, share: float) -> Method:
    """A method that learns from labels of which some are wrong."""
    return replace(method, what=f"{method.what}; {share:.0%} of the labels wrong", data={**method.data, "flip": share})


def in_layers(what: str, layers: int) -> Method:
    """Capability LoRAs in so many last layers (0 is all), learned from few pairs, since every layer is slow."""
    changes = {"groups": ONE_GROUP, "capabilities": ["preference", "new_words"], "capability_layers": layers}
    changes |= {"head_decay": LITTLE_DECAY}
    epochs = {"router": 0, "joint": 0, "task": 1, "capability": 1, "weigh": 1, "aggregate": 2}
    method = dmoerm(what, epochs, **changes, **NO_GENERAL)
    return replace(method, data={**method.data, "learn": 1000}, sampled=True, cached=layers == 1)


GOLD = "gold"
METHODS: dict[str, Method] = {
    "dmoerm": dmoerm("DMoERM: four inner models, ten capability experts and a general one of four members"),
    "six-groups": dmoerm("six inner models", groups=SIX_GROUPS),
    "no-capabilities": dmoerm(
        "its task models alone, from all pairs",
        {"joint": 0, "capability": 0, "weigh": 0, "aggregate": 0},
        share=0.0,
        capabilities=None,
        share_capabilities=False,
        aggregate_decay=0.0,
        **NO_GENERAL,
    ),
    "own-experts": dmoerm(
        "each inner model has four capability experts of its own",
        capabilities=OWN_CAPABILITIES,
        share_capabilities=False,
        capability_rank=3,
        general_rank=8,
    ),
    "hidden": dmoerm(
        "an MLP combines last states in place of scores",
        {"weigh": 0},
        last_lr=1e-4,
        aggregate="hidden",
        aggregate_dim=4,
        aggregate_decay=0.0,
    ),
    "no-general": dmoerm("it has no general expert", {"joint": 0}, **NO_GENERAL),
    "one-member": dmoerm(
        "its general expert is one LoRA, as large", general_members=1, general_rank=GENERAL_MEMBERS * GENERAL_RANK
    ),
    "no-weighing": dmoerm("its aggregation starts from the preference alone", {"weigh": 0}),
    "mlp": dmoerm("an MLP combines its scores", {"weigh": 0}, last_lr=RATE, aggregate_dim=16, aggregate_decay=0.0),
    "random-start": dmoerm(
        "its aggregation starts at random", {"weigh": 0}, aggregate_start="random", aggregate_decay=0.0
    ),
    "one-group": dmoerm(
        "one inner model with all experts, as large",
        {"router": 0, "joint": 0},
        groups=ONE_GROUP,
        task_rank=72,
        **NO_GENERAL,
    ),
    "joint": dmoerm("in place of a general expert inner models start from one of all pairs", **NO_GENERAL),
    "single": single(f"one LoRA of rank {RANK}", RANK),
    "single-equal": single("one LoRA, as large as DMoERM", EQUAL_RANK, head_decay=LITTLE_DECAY),
    "objectives": objectives(
        "one LoRA, as large, with a head for the preference and one for each capability", head_decay=LITTLE_DECAY
    ),
    "gate": gate("one LoRA, as large, with such heads and a gate that reads the prompt and weighs them"),
    "ensemble": ensemble("five LoRAs, together as large"),
    "properties": Method("no network: a regression on the measured properties, told the group", "properties"),
    "judge": Method("SmolLM2-135M asked for the better answer, in both orders", "judge", sampled=True),
    "layers-1": in_layers("capability LoRAs in the last layer", 1),
    "layers-2": in_layers("capability LoRAs in the last two layers", 2),
    "layers-all": in_layers("capability LoRAs in every layer", 0),
}
# It reads with three layers, where what it judges reads with one, and is told what an answer is to be.
METHODS[GOLD] = Method(
    "for each goal, which it is told, a LoRA in three layers that learned from the pairs of validation and test",
    "dmoerm",
    {"groups": GOALS, "task_layers": 3, "task_rank": RANK, "head_decay": HEAD_DECAY},
    {"router": 3, "task": PASSES},
    {"lr": RATE, "head_lr": HEAD_RATE},
    {"aggregate_share": 0.0, "held_out": True},
)
FLIPS = (0.25, 0.4)
# The objectives know the same capabilities as DMoERM, which wrong labels leave right.
ROBUST = ("dmoerm", "single-equal", "objectives", "ensemble")
FLIPPED = tuple(f"{name}-flip{round(100 * share)}" for share in FLIPS for name in ROBUST)
for name in FLIPPED:
    method, _, percent = name.partition("-flip")
    METHODS[name] = flipped(METHODS[method], int(percent) / 100)
# What validation chooses from: rates and decays, the same three settings of each method.
GRID = [(RATE, HEAD_DECAY), (RATE, LITTLE_DECAY), (3e-4, HEAD_DECAY)]
MAKERS = {
    "dmoerm": dmoerm,
    "single": partial(single, rank=RANK),
    "single-equal": partial(single, rank=EQUAL_RANK),
    "objectives": objectives,
    "gate": gate,
    "ensemble": ensemble,
}
TRIALS: dict[str, dict[str, Method]] = {
    name: {
        f"{name}.lr{lr:g}.{decay:g}": make(
            f"{METHODS[name].what}; rate {lr:g}, decay {decay:g}", lr=lr, head_decay=decay
        )
        for lr, decay in GRID
    }
    for name, make in MAKERS.items()
}
for trials in TRIALS.values():
    METHODS |= trials

# The table, over all seeds; the others run when they are named.
MAIN = (
    "dmoerm",
    "single",
    "single-equal",
    "objectives",
    "gate",
    "ensemble",
    "properties",
    "judge",
    GOLD,
    "no-capabilities",
    *FLIPPED,
)
# What a mixture has to beat, and other readings of these.
BASELINES = ("single", "single-equal", "objectives", "gate", "ensemble")
READINGS = ("ensemble/worst", "ensemble/uncertainty")
# What is compared with what, on the same pairs; names with a slash are other readings of a network.
PAIRS = (
    ("dmoerm", "single"),
    ("dmoerm", "single-equal"),
    ("dmoerm", "objectives"),
    ("dmoerm", "gate"),
    ("dmoerm", "ensemble"),
    ("dmoerm", "ensemble/worst"),
    ("dmoerm", "ensemble/uncertainty"),
    ("dmoerm", "longer"),
    ("dmoerm", "properties"),
    ("dmoerm", "judge"),
    ("dmoerm", "dmoerm/task"),
    ("dmoerm", "dmoerm/general"),
    ("dmoerm", "dmoerm/oracle"),
    ("dmoerm", "dmoerm/random"),
    ("dmoerm", "no-capabilities"),
    ("dmoerm", "six-groups"),
    ("dmoerm", "one-group"),
    ("dmoerm", "own-experts"),
    ("dmoerm", "hidden"),
    ("dmoerm", "no-general"),
    ("dmoerm", "one-member"),
    ("dmoerm", "no-weighing"),
    ("dmoerm", "mlp"),
    ("dmoerm", "random-start"),
    ("dmoerm", "joint"),
    *((f"dmoerm{end}", f"{name}{end}") for end in ("-flip25", "-flip40") for name in ROBUST[1:]),
    ("layers-2", "layers-1"),
    ("layers-all", "layers-1"),
)
# What the figure shows.
SHOWN = ("dmoerm", "single-equal", "gate", "ensemble", "properties", "longer")
# What picks answers of a policy, ours first.
PROXIES = ("dmoerm", *BASELINES, *READINGS)
