"""The methods of the comparison as plain data: adapters of the same base, on the same data, in equally many steps."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Method:
    """One line of the table.

    Attributes:
        what: In words.
        method: Of `MultitaskModel`.
        adapter: Arguments of its config.
        task: Arguments of `MultitaskTask`.
    """

    what: str
    method: str
    adapter: Mapping[str, Any] = field(default_factory=dict)
    task: Mapping[str, Any] = field(default_factory=dict)


def lora(r: int) -> Method:
    """PEFT's LoRA, with alpha = 2 r."""
    return Method(f"LoRA of rank {r}", "lora", {"r": r, "lora_alpha": 2 * r})


def mola(what: str, experts: int | list[int], top_k: int | None, **changes: Any) -> Method:
    """LoRA experts of rank 8, with alpha = 2 r as all others."""
    return Method(what, "mola", {"r": 8, "alpha": 16, "experts": experts, "top_k": top_k, **changes})


def smora(top_k: int = 8, block: int = 1, score: str = "sigmoid") -> Method:
    """`top_k` of 64 ranks, chosen in blocks of `block`, with alpha = 2 k."""
    blocks = "" if block == 1 else f" in blocks of {block}"
    how = "" if score == "sigmoid" else f", {score}"
    arguments = {"r": 64, "top_k": top_k, "alpha": 2 * top_k, "block_size": block, "score": score}
    # Scores of a softmax over 64 are small, and so is the step that may tip a choice.
    task = {"bias_rate": 1e-4} if score == "softmax" else {}
    return Method(f"SMoRA, {top_k} of 64 ranks{blocks}{how}", "smora", arguments, task)


def allocated(*experts: int) -> Method:
    """MoLA with so many experts in each of MiniLM's six layers, 30 in all."""
    return mola(f"MoLA, {'-'.join(map(str, experts))} experts, top-2", list(experts), 2)


METHODS: dict[str, Method] = {
    "heads": Method("heads alone", "none"),
    "lora-r8": lora(8),
    "lora-r64": lora(64),
    "moe-top1": mola("8 LoRA of rank 8, top-1", 8, 1),
    "moe-top2": mola("8 LoRA of rank 8, top-2", 8, 2),
    "moe-soft": mola("8 LoRA of rank 8, all of them weighted", 8, None, aux_losses={}),
    "shared-a": mola("8 B of rank 8 with one A, all of them weighted", 8, None, shared_a=True, aux_losses={}),
    "mola-inverted": allocated(2, 3, 4, 6, 7, 8),
    "mola-triangle": allocated(8, 7, 6, 4, 3, 2),
    "mola-hourglass": allocated(8, 5, 2, 2, 5, 8),
    "mola-diamond": allocated(2, 5, 8, 8, 5, 2),
    "mola-even": allocated(5, 5, 5, 5, 5, 5),
    "smora": smora(),
    "smora-softmax": smora(score="softmax"),
    "smora-k4": smora(4),
    "smora-k16": smora(16),
    "smora-k32": smora(32),
    "smora-p2": smora(8, 2),
    "smora-p4": smora(8, 4),
    "smora-k16-p4": smora(16, 4),
    "smora-k16-p8": smora(16, 8),
}

# The table; the others run when they are named.
MAIN = (
    "heads",
    "lora-r8",
    "lora-r64",
    "moe-top1",
    "moe-top2",
    "moe-soft",
    "shared-a",
    "mola-inverted",
    "mola-triangle",
    "mola-hourglass",
    "mola-diamond",
    "mola-even",
    "smora",
)
# What was to be decided, named before any run was scored; p-values of these are Holm's. All else is exploratory.
PRIMARY = (
    ("smora", "lora-r64"),
    ("smora", "moe-top2"),
    ("smora", "smora-p4"),
    ("mola-inverted", "mola-even"),
    ("mola-inverted", "mola-triangle"),
    ("mola-even", "lora-r64"),
)
# What else is compared, on the same examples. A partition is compared at equal total and active rank; between
# `smora-k16-p8` and `moe-top2` gates and balancing alone differ.
PAIRS = (
    *PRIMARY,
    ("smora", "lora-r8"),
    ("smora", "moe-top1"),
    ("smora", "mola-even"),
    ("smora", "smora-p2"),
    ("smora-p2", "smora-p4"),
    ("smora-k16", "smora-k16-p4"),
    ("smora-k16", "smora-k16-p8"),
    ("smora-k16", "moe-top2"),
    ("smora-k16-p8", "moe-top2"),
    ("smora", "smora-softmax"),
    ("smora-k4", "smora"),
    ("smora-k16", "smora"),
    ("smora-k32", "smora"),
    ("moe-top2", "lora-r64"),
    ("moe-top2", "moe-top1"),
    ("moe-soft", "moe-top2"),
    ("shared-a", "moe-soft"),
    ("mola-triangle", "mola-even"),
    ("mola-hourglass", "mola-even"),
    ("mola-diamond", "mola-even"),
    ("lora-r64", "heads"),
)
# What the figure shows.
SHOWN = ("lora-r8", "lora-r64", "moe-top1", "moe-top2", "mola-even", "smora")
# Rates of adapters that every method tries; that of the heads is the best of the same for `heads`, for all methods.
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
HEADS = "heads"
