"""Time and memory of a training step with mixtures of LoRA experts, against plain LoRA and against a loop over experts.

    python -m benchmarks.lora [--json FILE] [--rounds N] [--batch ROWSxTOKENS]

All adapt every linear layer of the same encoder, of MiniLM's size and with random weights, and take turns in one
process; the table shows medians and ratios over PEFT's LoRA of as many ranks in all (r=64) and as many active ones
(r=16). A step is forward, backward, and AdamW; ours with all that belongs to it, auxiliary losses and biases. `loop` is
how released code computes a mixture: expert by expert, on the rows that chose it. Memory is what one step adds to the
resident memory of a process of its own.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from zoo.lora import MolaConfig, SmoraConfig
from zoo.moe import collect_aux_losses, update_selection_biases
from zoo.report import print_table

EXPERTS, RANK, ACTIVE = 8, 8, 2
# What each is compared with, and how much longer it may take.
TARGETS = {"smora": ("lora64", 1.3), "mola": ("lora16", 1.6), "loop": ("lora64", None)}


class LoopMixture(nn.Module):
    """A linear layer with LoRA experts, one after the other."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.router = nn.Linear(base.in_features, EXPERTS, bias=False)
        self.down = nn.ModuleList(nn.Linear(base.in_features, RANK, bias=False) for _ in range(EXPERTS))
        self.up = nn.ModuleList(nn.Linear(RANK, base.out_features, bias=False) for _ in range(EXPERTS))
        for expert in self.up:
            nn.init.zeros_(expert.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, S, D)` to `(B, S, D_out)`."""
        units = x.flatten(0, -2)
        weight, index = torch.softmax(self.router(units), dim=1).topk(ACTIVE, dim=1)
        weight = weight / weight.sum(1, keepdim=True)
        out = torch.zeros(units.shape[0], self.base.out_features)
        for expert in range(EXPERTS):
            row, slot = (index == expert).nonzero(as_tuple=True)
            added = self.up[expert](self.down[expert](units[row])) * (2 * weight[row, slot, None])
            out = out.index_add(0, row, added)
        return self.base(x) + out.view(*x.shape[:-1], -1)


def encoder() -> nn.Module:
    """An encoder of MiniLM-L6's size."""
    torch.manual_seed(0)
    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    return BertModel(config, add_pooling_layer=False)


def loop() -> nn.Module:
    """The encoder with a loop over experts in every linear layer."""
    model = encoder().requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, LoopMixture(module))
    return model


CONTENDERS: dict[str, Callable[[], nn.Module]] = {
    "lora64": lambda: get_peft_model(encoder(), LoraConfig(r=64, lora_alpha=128, target_modules="all-linear")),
    "smora": lambda: get_peft_model(encoder(), SmoraConfig(r=64, top_k=8, target_modules="all-linear")),
    "lora16": lambda: get_peft_model(encoder(), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")),
    "mola": lambda: get_peft_model(
        encoder(), MolaConfig(r=RANK, top_k=ACTIVE, experts=EXPERTS, target_modules="all-linear")
    ),
    "loop": loop,
}


def check_equal() -> None:
    """The loop and our layer with the same weights give the same output, or their times mean nothing."""
    base = nn.Linear(384, 384)
    naive = LoopMixture(base)
    ours = MolaConfig(r=RANK, top_k=ACTIVE, experts=EXPERTS, init_weights=False).build(384, 384, base, "")
    with torch.no_grad():
        naive.router.weight.copy_(ours.router.weight)
        for expert in range(EXPERTS):
            ranks = slice(expert * RANK, (expert + 1) * RANK)
            naive.down[expert].weight.copy_(ours.lora_A[ranks])
            naive.up[expert].weight.copy_(ours.lora_B[:, ranks])
    x = torch.randn(4, 32, 384)
    torch.testing.assert_close(ours(base(x), x), naive(x), atol=1e-5, rtol=1e-4)


class Step:
    """One training step of a contender on the same batch of padded rows."""

    def __init__(self, name: str, rows: int, tokens: int) -> None:
        self.model = CONTENDERS[name]().train()
        self.balance = name == "smora"
        self.optimizer = torch.optim.AdamW(p for p in self.model.parameters() if p.requires_grad)
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, 30000, (rows, tokens), generator=generator)
        lengths = torch.randint(tokens // 2, tokens + 1, (rows, 1), generator=generator)
        self.mask = (torch.arange(tokens) < lengths).long()

    def __call__(self) -> None:
        """Forward, backward, update."""
        out = self.model(input_ids=self.ids, attention_mask=self.mask).last_hidden_state
        (out.square().mean() + collect_aux_losses(self.model).total).backward()
        if self.balance:
            update_selection_biases(self.model)
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure(rows: int, tokens: int, rounds: int) -> dict[str, float]:
    """Median seconds of a step over rounds in which all take turns, after one to warm up."""
    steps = {name: Step(name, rows, tokens) for name in CONTENDERS}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def step_memory(name: str, rows: int, tokens: int) -> float:
    """MiB that two steps add to the resident memory of this process at its peak."""
    step = Step(name, rows, tokens)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def memory_alone(name: str, batch: str) -> float:
    """As `step_memory`, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.lora", "--batch", batch, "--memory-of", name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    """Measure, print one table, and write the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", default="16x128", help="rows x tokens")
    parser.add_argument("--memory-of", choices=CONTENDERS, help="print the memory of this one alone")
    options = parser.parse_args()
    rows, tokens = (int(size) for size in options.batch.split("x"))
    if options.memory_of:
        print(step_memory(options.memory_of, rows, tokens))
        return
    check_equal()
    memory = {name: memory_alone(name, options.batch) for name in CONTENDERS}
    seconds = measure(rows, tokens, options.rounds)
    lines = []
    for name in CONTENDERS:
        peer, limit = TARGETS.get(name, (name, None))
        lines.append(
            {
                "adapter": name,
                "ms": 1e3 * seconds[name],
                "over": peer,
                "time": seconds[name] / seconds[peer],
                "allowed": limit or "",
                "MiB": memory[name],
                "memory": memory[name] / memory[peer],
            }
        )
    print_table(f"A training step of {options.batch} tokens, {torch.get_num_threads()} threads", lines)
    if options.json:
        row = {"case": options.batch, "mode": "train", "seconds": seconds, "step_mib": memory}
        options.json.write_text(json.dumps({"rows": [row]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
