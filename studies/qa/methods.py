"""The methods of the comparison as plain data: readers learned in domain, and what a second stage makes of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Method:
    """One line of the table.

    Attributes:
        what: In words.
        start: The method whose reader a second stage goes on from; None builds a new one.
        network: Arguments of `QAReader` for a new one; of a second stage, for one that the first stage's becomes.
        data: Arguments of `QADataModule`; what its augmentation draws follows the run's seed.
        task: Arguments of `QATask`.
        epochs: All of them: nothing is chosen among epochs.
    """

    what: str
    start: str | None = None
    network: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    task: Mapping[str, Any] = field(default_factory=dict)
    epochs: int = 1


def reader(what: str, **network: Any) -> Method:
    """A reader that learns in domain.

    Args:
        what: In words.
        network: Arguments of `QAReader`.
    """
    data = {"stage": "in_domain", "keep_empty": 0.1}
    return Method(what, network={"freeze": "embeddings", **network}, data=data, task={"lr": 3e-4})


def out_of_domain(
    start: str, what: str, copies: int = 0, freezing: Mapping[str, Any] | None = None, epochs: int = 1
) -> Method:
    """A second stage on the few out-of-domain questions.

    Args:
        start: The method whose reader it goes on from.
        what: In words.
        copies: New contexts of each question by EDA; 0 is without augmentation.
        freezing: What is not trained from now on.
        epochs: Over questions and copies.
    """
    data = {"stage": "ood", "keep_empty": 0.2} | ({"augment": {"copies": copies}} if copies else {})
    return Method(what, start, data=data, task={"lr": 3e-4, "freezing": dict(freezing or {})}, epochs=epochs)


def keeping(method: Method, what: str, replay: int, mixing: float) -> Method:
    """A second stage that keeps what the first has learned.

    Args:
        method: One that forgets it.
        what: In words.
        replay: Questions of each in-domain domain beside the out-of-domain ones, in all epochs together.
        mixing: Share of what the second stage has learned in the average of both readers.
    """
    data = {**method.data, "stage": "joint", "replay": replay // method.epochs}
    return replace(method, what=what, data=data, task={**method.task, "mixing": mixing})


INSIDE: dict[str, Any] = {"moe_layers": [-2, -1], "num_experts": 4}
HEAD: dict[str, Any] = {"placement": "head", "num_experts": 4}
# With the base frozen but for LoRA and the experts, or with narrow experts, a checkpoint stays below 25 MB.
LORA: dict[str, Any] = {**INSIDE, "freeze": "base", "lora_rank": 16}
ADAPTERS: dict[str, Any] = {**INSIDE, "experts": "adapters"}

METHODS: dict[str, Method] = {
    # With one full expert per token, the plain encoder is the twin: the same network with as many active parameters.
    "dense": reader("plain encoder", moe_layers=[], mixture=False),
    "moe": reader("4 upcycled experts in the last two layers, top-1", **INSIDE),
    "moe-top2": reader("the same, top-2", **INSIDE, top_k=2),
    "head": reader("4 upcycled experts behind the last layer, top-1", **HEAD),
    "twin-top2": reader("moe-top2 with one network twice as wide", **INSIDE, top_k=2, mixture=False),
    "twin-head": reader("head with one network", **HEAD, mixture=False),
    "moe-lora": reader("moe with the base frozen and LoRA in the attention", **LORA),
    "twin-lora": reader("moe-lora with one network", **LORA, mixture=False),
    "adapters": reader("4 adapters beside the last two networks, top-1", **ADAPTERS),
    "twin-adapters": reader("adapters with one adapter", **ADAPTERS, mixture=False),
}
# Without augmentation the questions are seen as often as they and their copies together, in about as many steps.
COPIES = 2
REPLAY, MIXING = 150, 0.6
for name in list(METHODS):
    ood = out_of_domain(name, f"{name}, then out of domain", epochs=1 + COPIES)
    eda = out_of_domain(name, f"{name}, then out of domain with EDA", COPIES)
    METHODS |= {
        f"{name}-ood": ood,
        f"{name}-ood-eda": eda,
        f"{name}-ood-keep": keeping(ood, f"{ood.what}, keeping what was known", REPLAY, MIXING),
        f"{name}-ood-eda-keep": keeping(eda, f"{eda.what}, keeping what was known", REPLAY, MIXING),
    }
# The first stage's plain encoder becomes a mixture for the second.
LATE = {
    "late-moe": INSIDE,
    "late-moe-top2": {**INSIDE, "top_k": 2},
    "late-adapters": ADAPTERS,
    "late-head": HEAD,
    "late-twin-top2": {**INSIDE, "top_k": 2, "mixture": False},
    "late-twin-adapters": {**ADAPTERS, "mixture": False},
    "late-twin-head": {**HEAD, "mixture": False},
}
for name, network in LATE.items():
    METHODS[f"{name}-ood-eda-keep"] = replace(
        METHODS["dense-ood-eda-keep"],
        what=f"dense, then {name.removeprefix('late-')} out of domain with EDA, keeping what was known",
        network=network,
    )
METHODS["moe-ood-eda-frozen"] = out_of_domain(
    "moe", "moe-ood-eda with its experts frozen", COPIES, {"freeze_experts": True}
)

# The table: what fits a checkpoint of 25 MB, its twin, and the plain encoder. The others run when they are named.
MAIN = (
    "dense",
    "adapters",
    "twin-adapters",
    "dense-ood-eda-keep",
    "adapters-ood-eda-keep",
    "twin-adapters-ood-eda-keep",
    "dense-ood-keep",
    "adapters-ood-keep",
)
# What is compared with what, on the same questions.
PAIRS = (
    ("adapters-ood-eda-keep", "dense"),
    ("adapters-ood-eda-keep", "twin-adapters-ood-eda-keep"),
    ("adapters-ood-eda-keep", "dense-ood-eda-keep"),
    ("adapters-ood-eda-keep", "adapters"),
    ("adapters-ood-eda-keep", "adapters-ood-keep"),
    ("adapters-ood-eda-keep", "adapters-ood-eda"),
    ("adapters", "dense"),
    ("adapters", "twin-adapters"),
    ("dense-ood-eda-keep", "dense"),
    ("dense-ood-eda-keep", "dense-ood-keep"),
    ("dense-ood-eda-keep", "dense-ood-eda"),
    ("adapters-ood-eda", "twin-adapters-ood-eda"),
    ("dense-ood-eda", "dense"),
    ("moe", "dense"),
    ("moe-ood-eda-keep", "dense"),
    ("moe-ood-eda-keep", "dense-ood-eda-keep"),
    ("late-moe-ood-eda-keep", "dense-ood-eda-keep"),
    ("late-moe-top2-ood-eda-keep", "late-twin-top2-ood-eda-keep"),
    ("late-adapters-ood-eda-keep", "dense-ood-eda-keep"),
    ("late-adapters-ood-eda-keep", "late-twin-adapters-ood-eda-keep"),
    ("late-head-ood-eda-keep", "dense-ood-eda-keep"),
    ("late-head-ood-eda-keep", "late-twin-head-ood-eda-keep"),
    ("moe-ood-eda-frozen", "moe-ood-eda"),
    ("moe-top2", "twin-top2"),
    ("head", "twin-head"),
    ("moe-lora-ood-eda-keep", "twin-lora-ood-eda-keep"),
)
# What the figure shows.
SHOWN = ("dense", "adapters", "dense-ood-eda-keep", "adapters-ood-eda-keep")
