"""The methods of the comparison as plain data: adapters of the same base, on the same data."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Method:
    """One line of the table.

    Attributes:
        what: In words.
        method: Of `MultitaskModel`.
        adapter: Arguments of its config.
        rate_of: The method whose learning rate it takes, being another setting of the same layer; "" has its own.
        times: How many times as many steps it learns for as the others do.
        rate_share: Its rate, as a share of the one that was chosen.
    """

    what: str
    method: str
    adapter: Mapping[str, Any] = field(default_factory=dict)
    rate_of: str = ""
    times: int = 1
    rate_share: float = 1.0


# Of all methods: what is added is divided by the ranks that a token uses, so that a step of Adam moves a layer equally
# far in all of them.
ALPHA = 16


def lora(r: int) -> Method:
    """PEFT's LoRA."""
    return Method(f"LoRA of rank {r}", "lora", {"r": r, "lora_alpha": ALPHA})


def mola(what: str, experts: int | list[int], top_k: int | None, rate_of: str = "", **changes: Any) -> Method:
    """LoRA experts of rank 8; the weight of the balance loss is the paper's 0.001 a layer, of which there are six."""
    arguments = {"r": 8, "alpha": ALPHA, "experts": experts, "top_k": top_k, "aux_losses": {"load_balancing": 0.006}}
    return Method(what, "mola", {**arguments, **changes}, rate_of)


def smora(top_k: int = 8, block: int = 1, rate_of: str = "") -> Method:
    """`top_k` of 64 ranks, chosen in blocks of `block`."""
    blocks = "" if block == 1 else f" in blocks of {block}"
    arguments = {"r": 64, "top_k": top_k, "alpha": ALPHA, "block_size": block}
    return Method(f"SMoRA, {top_k} of 64 ranks{blocks}", "smora", arguments, rate_of)


def allocated(*experts: int) -> Method:
    """MoLA with so many experts in each of MiniLM's six layers, 30 in all."""
    rate_of = "" if len(set(experts)) == 1 else "mola-even"
    return mola(f"MoLA, {'-'.join(map(str, experts))} experts, top-2", list(experts), 2, rate_of)


METHODS: dict[str, Method] = {
    "heads": Method("heads alone", "none"),
    "lora-r8": lora(8),
    "lora-r64": lora(64),
    # A single gate is a probability of about a quarter, where those of two sum to 1.
    "moe-top1": mola("8 LoRA of rank 8, top-1", 8, 1, alpha=4 * ALPHA),
    "moe-top2": mola("8 LoRA of rank 8, top-2", 8, 2),
    "moe-soft": mola("8 LoRA of rank 8, all of them weighted", 8, None, aux_losses={}),
    "shared-a": mola(
        "8 B of rank 8 with one A, all of them weighted", 8, None, "moe-soft", shared_a=True, aux_losses={}
    ),
    "mola-inverted": allocated(2, 3, 4, 6, 7, 8),
    "mola-triangle": allocated(8, 7, 6, 4, 3, 2),
    "mola-hourglass": allocated(8, 5, 2, 2, 5, 8),
    "mola-diamond": allocated(2, 5, 8, 8, 5, 2),
    "mola-even": allocated(5, 5, 5, 5, 5, 5),
    "smora": smora(),
    "smora-p4": smora(8, 4, rate_of="smora"),
    "smora-k16": smora(16, rate_of="smora-k16-p8"),
    "smora-k16-p8": smora(16, 8),
    "smora-k4": smora(4, rate_of="smora"),
    "smora-k32": smora(32, rate_of="smora"),
}
# What is released, and what plain LoRA is worth after as many steps: at the rate that short trials chose; at the next
# lower one that they had; and there with dropout. Validation chooses between these.
LONG, SLOW, DROPOUT, TIMES = "-long", "-slow", "-dropout", 3
for name in ("lora-r64", "mola-even", "smora"):
    method = METHODS[name]
    long = replace(method, what=f"{method.what}; {TIMES} times as long", rate_of=name, times=TIMES)
    slow = replace(long, what=f"{long.what}, at 0.3 of the rate", rate_share=0.3)
    dropped = {"lora_dropout" if method.method == "lora" else "dropout": 0.1}
    METHODS |= {
        name + LONG: long,
        name + SLOW: slow,
        name + DROPOUT: replace(slow, what=f"{slow.what}, dropout 0.1", adapter={**method.adapter, **dropped}),
    }
LONGER = (LONG, SLOW, DROPOUT)

# The table; the others run when they are named.
MAIN = (
    "heads",
    "lora-r8",
    "lora-r64",
    "moe-top1",
    "moe-top2",
    "mola-inverted",
    "mola-triangle",
    "mola-hourglass",
    "mola-even",
    "smora",
    "smora-k16",
    "smora-k16-p8",
)
# What was to be decided, named before any run was scored; p-values of these are Holm's. All else is exploratory. A
# partition is compared at equal total and active rank; `smora-k16-p8` is `moe-top2` with other gates and balancing.
PRIMARY = (
    ("smora", "lora-r64"),
    ("smora", "moe-top2"),
    ("smora-k16", "smora-k16-p8"),
    ("mola-inverted", "mola-even"),
    ("mola-inverted", "mola-triangle"),
    ("moe-top2", "lora-r64"),
)
# What else is compared, on the same examples.
PAIRS = (
    *PRIMARY,
    ("smora", "lora-r8"),
    ("smora", "moe-top1"),
    ("smora", "mola-even"),
    ("smora", "smora-p4"),
    ("smora-k16", "moe-top2"),
    ("smora-k16-p8", "moe-top2"),
    ("smora-k4", "smora"),
    ("smora-k16", "smora"),
    ("smora-k32", "smora"),
    ("mola-even", "lora-r64"),
    ("moe-top2", "moe-top1"),
    ("moe-soft", "moe-top2"),
    ("shared-a", "moe-soft"),
    ("mola-triangle", "mola-even"),
    ("mola-hourglass", "mola-even"),
    ("mola-diamond", "mola-even"),
    ("lora-r64", "heads"),
    ("smora-long", "lora-r64-long"),
    ("mola-even-long", "lora-r64-long"),
    ("smora-long", "smora"),
    ("smora-slow", "lora-r64-slow"),
    ("mola-even-slow", "lora-r64-slow"),
    ("smora-slow", "lora-r64-long"),
    ("mola-even-slow", "lora-r64-long"),
    ("smora-slow", "smora-long"),
    ("mola-even-slow", "mola-even-long"),
    ("lora-r64-slow", "lora-r64-long"),
    ("smora-dropout", "lora-r64-dropout"),
    ("mola-even-dropout", "lora-r64-dropout"),
    ("smora-dropout", "lora-r64-long"),
    ("smora-dropout", "smora-slow"),
    ("mola-even-dropout", "mola-even-slow"),
    ("lora-r64-dropout", "lora-r64-slow"),
)
# What the figure shows.
SHOWN = ("lora-r8", "lora-r64", "moe-top1", "moe-top2", "mola-even", "smora")
# Rates that every kind of layer tries, and those of the heads, which are chosen for `heads` alone. At 4e-3 LoRA of rank
# 64 learned nothing.
RATES = (1.5e-4, 5e-4, 1.5e-3)
HEADS = "heads"
HEAD_RATES = (5e-4, 1.5e-3, 4e-3, 1.2e-2)
# Of all routers: at the rates of adapters a step of Adam moves their logits by as much as these differ.
ROUTER_RATE = 3e-4


def tuned_as(method: str) -> str:
    """The method whose trials choose the learning rate of one.

    Args:
        method: Its name.
    """
    return METHODS[method].rate_of or method
