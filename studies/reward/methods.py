"""The methods of the comparison as plain data: reward models on the same frozen base, from the same pairs."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

# What `python -m tasks.reward.groups` prints, the mixed group by its largest category.
GROUPS: dict[str, list[str]] = {
    "Harmlessness": ["Harmlessness"],
    "Translation": [
        "Brainstorming",
        "Chat",
        "Classification",
        "Generation",
        "Rewrite",
        "Role Playing",
        "Summarization",
        "Translation",
    ],
    "HH-harmless-base": ["HH-harmless-base"],
    "Reasoning": ["Closed QA", "Reasoning"],
    "Open QA": ["Open QA"],
    "Code": ["Code"],
}
ONE_GROUP: dict[str, list[str]] = {"all": []}
HELPFUL = ["preference", "new_words", "formatting", "names_and_numbers", "prompt_overlap"]
CAPABILITIES: dict[str, list[str]] = {
    "Harmlessness": ["preference", "warning_words", "refusal", "polite_words", "new_words"],
    "Translation": HELPFUL,
    "HH-harmless-base": ["preference", "short_sentences", "refusal", "polite_words", "few_hedges"],
    "Reasoning": HELPFUL,
    "Open QA": HELPFUL,
    "Code": HELPFUL,
}
# Of a single inner model, and of several objectives: what counts in some group.
ALL_CAPABILITIES = list(
    dict.fromkeys(name for names in CAPABILITIES.values() for name in names if name != "preference")
)


@dataclass(frozen=True, slots=True)
class Method:
    """One line of the table.

    Attributes:
        what: In words.
        kind: Of `RewardTask`; `judge` learns nothing.
        network: Arguments of its class.
        epochs: Of each phase: nothing is chosen among epochs.
        task: Further arguments of `RewardTask`.
        data: Arguments of `StudyData`.
        sampled: Whether it is so slow that it is scored on a sample of the pairs.
        cached: Whether what the frozen layers make of the texts is kept.
    """

    what: str
    kind: Literal["dmoerm", "ensemble", "objectives", "judge"]
    network: Mapping[str, Any] = field(default_factory=dict)
    epochs: Mapping[str, int] = field(default_factory=dict)
    task: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    sampled: bool = False
    cached: bool = True


# What learns alike: epochs of each phase, the rate, and the share of the pairs that only the aggregation learns from.
EPOCHS = {"router": 3, "joint": 2, "task": 1, "capability": 1, "aggregate": 2}
PASSES = 4
RATE = 1e-3
SHARE = 0.4
RANK = 64
# At which one LoRA has as many trained parameters as DMoERM, more than its layer has itself.
EQUAL_RANK = 452


def dmoerm(
    what: str, epochs: Mapping[str, int] | None = None, share: float = SHARE, lr: float = RATE, **network: Any
) -> Method:
    """DMoERM with all its parts, but for what is named.

    Args:
        what: In words.
        epochs: Of phases that have others than `EPOCHS`; 0 leaves one out.
        share: Of the pairs that only the aggregation learns from.
        lr: Learning rate.
        network: Arguments of `DMoERM` that differ.
    """
    counts = {phase: count for phase, count in {**EPOCHS, **(epochs or {})}.items() if count}
    chosen = {"groups": GROUPS, "capabilities": CAPABILITIES, **network}
    return Method(what, "dmoerm", chosen, counts, {"lr": lr}, {"aggregate_share": share})


def single(what: str, rank: int, lr: float = RATE) -> Method:
    """One LoRA and a head: the twin.

    Args:
        what: In words.
        rank: Of the LoRA.
        lr: Learning rate.
    """
    network = {"groups": ONE_GROUP, "task_rank": rank}
    return Method(what, "dmoerm", network, {"joint": PASSES}, {"lr": lr}, {"aggregate_share": 0.0})


def ensemble(what: str, lr: float = RATE, **data: Any) -> Method:
    """Five LoRAs, together as large as DMoERM.

    Args:
        what: In words.
        lr: Learning rate.
        data: Arguments of `StudyData`.
    """
    learned = {"aggregate_share": 0.0, **data}
    return Method(what, "ensemble", {"members": 5, "rank": 90}, {"members": PASSES}, {"lr": lr}, learned)


def objectives(what: str, gate: bool, lr: float = RATE) -> Method:
    """One LoRA, as large as DMoERM, with a head for the preference and one for each capability.

    Args:
        what: In words.
        gate: Whether a gate that reads the prompt weighs the heads.
        lr: Learning rate.
    """
    network = {"capabilities": ALL_CAPABILITIES, "rank": EQUAL_RANK, "gate": gate}
    epochs = {"objectives": PASSES} | ({"gate": 2} if gate else {})
    return Method(what, "objectives", network, epochs, {"lr": lr}, {"aggregate_share": 0.0})


def flipped(method: Method, share: float) -> Method:
    """A method that learns from labels of which some are wrong."""
    return replace(method, what=f"{method.what}; {share:.0%} of the labels wrong", data={**method.data, "flip": share})


def in_layers(what: str, layers: int) -> Method:
    """Capability LoRAs in so many last layers (0 is all), learned from few pairs, since every layer is slow."""
    network = {"groups": ONE_GROUP, "capabilities": ["preference", "new_words"], "capability_layers": layers}
    epochs = {"joint": 2, "capability": 1, "aggregate": 1}
    data = {"aggregate_share": 0.0, "learn": 500}
    return Method(what, "dmoerm", network, epochs, {"lr": RATE}, data, sampled=True, cached=layers == 1)


GOLD = "gold"
METHODS: dict[str, Method] = {
    "dmoerm": dmoerm("DMoERM: six inner models, five capability experts each"),
    "no-capabilities": dmoerm(
        "its task models alone", {"capability": 0, "aggregate": 0, "task": 2}, share=0.0, capabilities=None
    ),
    "one-expert": dmoerm("one expert per inner model, that of the preference", capabilities=["preference"]),
    "score": dmoerm("it aggregates scores in place of last states", aggregate="score"),
    "random-start": dmoerm("its aggregation starts at random", aggregate_start="random"),
    "one-group": dmoerm(
        "one inner model with all experts",
        {"router": 0},
        groups=ONE_GROUP,
        capabilities=["preference", *ALL_CAPABILITIES],
    ),
    "no-joint": dmoerm("its inner models learn from their own pairs alone", {"joint": 0, "task": 3}),
    "single": single("one LoRA, of the rank that was best on validation", RANK),
    "single-equal": single("one LoRA, as large as DMoERM", EQUAL_RANK),
    "objectives": objectives("one LoRA, a head for the preference and one for each capability", gate=False),
    "gate": objectives("the same, its heads weighed by a gate that reads the prompt", gate=True),
    "ensemble": ensemble("five LoRAs"),
    "judge": Method("SmolLM2-135M asked for the better answer, in both orders", "judge", sampled=True),
    "layers-1": in_layers("capability LoRAs in the last layer", 1),
    "layers-2": in_layers("capability LoRAs in the last two layers", 2),
    "layers-all": in_layers("capability LoRAs in every layer", 0),
    GOLD: ensemble("five LoRAs that learned from the pairs of validation and test", held_out=True),
}
FLIPS = (0.25, 0.4)
ROBUST = ("dmoerm", "single", "ensemble", "objectives")
FLIPPED = tuple(f"{name}-flip{round(100 * share)}" for share in FLIPS for name in ROBUST)
for name in FLIPPED:
    method, _, percent = name.partition("-flip")
    METHODS[name] = flipped(METHODS[method], int(percent) / 100)
# What validation chooses from, by what it decides: the same rates for all, and what else each needs.
RATES = (3e-4, 1e-3, 3e-3)
TRIALS: dict[str, dict[str, Method]] = {
    "dmoerm": {
        f"dmoerm.share{share:g}.lr{lr:g}": dmoerm(f"DMoERM, share {share:g}, rate {lr:g}", share=share, lr=lr)
        for share in (0.0, 0.1, SHARE)
        for lr in RATES
    },
    "single": {f"single.lr{lr:g}": single(f"one LoRA of rank {RANK}, rate {lr:g}", RANK, lr) for lr in (1e-4, *RATES)},
    "single-equal": {
        f"single-equal.lr{lr:g}": single(f"one LoRA of rank {EQUAL_RANK}, rate {lr:g}", EQUAL_RANK, lr)
        for lr in (1e-4, *RATES)
    },
    "ensemble": {f"ensemble.lr{lr:g}": ensemble(f"five LoRAs, rate {lr:g}", lr) for lr in RATES},
    "objectives": {
        f"objectives.lr{lr:g}": objectives(f"a head for each objective, rate {lr:g}", gate=False, lr=lr) for lr in RATES
    },
}
for trials in TRIALS.values():
    METHODS |= trials

# The table; the others run when they are named.
MAIN = (
    "dmoerm",
    "single",
    "single-equal",
    "objectives",
    "gate",
    "ensemble",
    "judge",
    GOLD,
    "no-capabilities",
    "one-expert",
    "score",
    "random-start",
    "one-group",
    "no-joint",
    *FLIPPED,
    "layers-1",
    "layers-2",
    "layers-all",
)
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
    ("dmoerm", "judge"),
    ("dmoerm", "dmoerm/oracle"),
    ("dmoerm", "no-capabilities"),
    ("dmoerm", "one-expert"),
    ("dmoerm", "score"),
    ("dmoerm", "random-start"),
    ("dmoerm", "one-group"),
    ("dmoerm", "no-joint"),
    ("dmoerm-flip25", "single-flip25"),
    ("dmoerm-flip40", "single-flip40"),
    ("dmoerm-flip25", "ensemble-flip25"),
    ("dmoerm-flip40", "ensemble-flip40"),
    ("dmoerm-flip25", "objectives-flip25"),
    ("dmoerm-flip40", "objectives-flip40"),
    ("layers-2", "layers-1"),
    ("layers-all", "layers-1"),
)
# What the figure shows.
SHOWN = ("dmoerm", "single", "objectives", "ensemble", "longer")
# What picks answers of a policy, ours first.
PROXIES = ("dmoerm", "single", "objectives", "ensemble")
