"""Time of one MoE layer against its peers and against its limit, a dense network of the same active size.

    python -m benchmarks.moe_layer [--json FILE] [--case NAME] [--rounds N]

All contenders hold the same weights where they can and take turns in one process; the table shows medians over the
dense limit, router included. Peers that are not installed (transformers, st-moe-pytorch) are left out, and so is a
backend whose copies of the weights would not fit into `MAX_GIB`.
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.moe import GroupedExperts, MoELayer, TopKRouter
from zoo.report import print_table

MAX_GIB = 6.0
MODES = ("train", "inference")


@dataclass(frozen=True)
class Case:
    """One shape: tokens T, width D, expert width H, experts E, slots k."""

    tokens: int
    dim: int
    hidden: int
    experts: int
    top_k: int

    def __str__(self) -> str:
        return f"T{self.tokens} D{self.dim} H{self.hidden} E{self.experts} k{self.top_k}"


CASES = (
    Case(2048, 256, 512, 8, 2),
    Case(4096, 256, 256, 64, 6),
    Case(512, 768, 1536, 8, 2),
    Case(8192, 64, 128, 16, 2),
    Case(2048, 512, 1024, 32, 1),
    Case(16, 256, 512, 8, 2),
    Case(16, 512, 1024, 32, 1),
)


class DenseLimit(nn.Module):
    """The gated feed-forward network with as many active units as the K experts of a token have together."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(T, D)` to `(T, D)`."""
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(nn.functional.silu(gate) * up)


def ours(case: Case, backend: str = "auto") -> MoELayer:
    """Our layer, routing as Mixtral does."""
    return MoELayer(
        TopKRouter(case.dim, case.experts, case.top_k),
        GroupedExperts(case.experts, case.dim, case.hidden, backend=backend),
    )


def mixtral(case: Case, implementation: str, layer: MoELayer) -> nn.Module:
    """The Mixtral block of transformers with our layer's weights."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=case.dim,
        intermediate_size=case.hidden,
        num_local_experts=case.experts,
        num_experts_per_tok=case.top_k,
    )
    config._experts_implementation = implementation
    block = MixtralSparseMoeBlock(config)
    with torch.no_grad():
        block.gate.weight.copy_(layer.router.weight)
        block.experts.gate_up_proj.copy_(layer.experts.up_proj)
        block.experts.down_proj.copy_(layer.experts.down_proj)
    return Batched(block)


class Batched(nn.Module):
    """A peer that wants `(batch, tokens, D)`, and may return a tuple."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Map `(T, D)` to `(T, D)`."""
        out = self.inner(x[None])
        return (out[0] if isinstance(out, tuple) else out)[0]


def st_moe(case: Case) -> nn.Module:
    """st-moe-pytorch's layer with experts of the same width; it drops what exceeds its capacity."""
    from st_moe_pytorch import MoE

    inner = MoE(
        dim=case.dim,
        num_experts=case.experts,
        expert_hidden_mult=1.5 * case.hidden / case.dim,
        gating_top_n=max(case.top_k, 2),
    )
    return Batched(inner)


def contenders(case: Case, backends: list[str]) -> dict[str, nn.Module]:
    """Everything that takes part, by name."""
    layer = ours(case)
    found: dict[str, nn.Module] = {"dense": DenseLimit(case.dim, case.top_k * case.hidden), "ours": layer}
    for backend in backends:
        found[f"ours {backend}"] = ours(case, backend)
        found[f"ours {backend}"].load_state_dict(layer.state_dict())
    try:
        for implementation in ("eager", "batched_mm", "grouped_mm"):
            found[f"transformers {implementation}"] = mixtral(case, implementation, layer)
    except ImportError:
        print("transformers is not installed: left out")
    try:
        found["st-moe-pytorch"] = st_moe(case)
    except ImportError:
        print("st-moe-pytorch is not installed: left out")
    return found


def too_large(name: str, case: Case, mode: str) -> bool:
    """Whether a contender would copy more than `MAX_GIB`: a weight per slot, or a (T, E, C) dispatch tensor."""
    slots = case.tokens * case.top_k
    copies = {
        "transformers batched_mm": slots * 3 * case.hidden * case.dim,
        "st-moe-pytorch": 3 * case.tokens * max(2, case.top_k) * case.tokens * max(2, case.top_k) * 2,
    }
    return copies.get(name, 0) * 4 * (2 if mode == "train" else 1) > MAX_GIB * 2**30


def run_once(model: nn.Module, x: Tensor, mode: str) -> None:
    """One forward, and in training one backward."""
    if mode == "inference":
        with torch.no_grad():
            model(x)
        return
    model.zero_grad(set_to_none=True)
    x.grad = None
    model(x).square().mean().backward()


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that a forward keeps for its backward, parameters and input aside, each storage once."""
    outside = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), x)}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in outside:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = model(x)
    del kept
    return sum(sizes.values())


def check_equal(models: dict[str, nn.Module], x: Tensor) -> None:
    """Contenders with the same weights must give the same output, or their times mean nothing."""
    with torch.no_grad():
        expected = models["ours"](x)
        for name, model in models.items():
            if name.startswith(("ours", "transformers")):
                torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-3, msg=name)


def measure(case: Case, rounds: int, backends: list[str]) -> list[dict[str, Any]]:
    """Medians of all contenders, taking turns: one row per mode."""
    torch.manual_seed(0)
    models = contenders(case, backends)
    x = torch.randn(case.tokens, case.dim, requires_grad=True)
    check_equal({name: model for name, model in models.items() if not too_large(name, case, "inference")}, x)
    rows = []
    for mode in MODES:
        taking_part = {name: model.train(mode == "train") for name, model in models.items()}
        taking_part = {name: model for name, model in taking_part.items() if not too_large(name, case, mode)}
        times: dict[str, list[float]] = {name: [] for name in taking_part}
        for _ in range(rounds + 1):
            for name, model in taking_part.items():
                times[name].append(timed(model, x, mode))
        seconds = {name: statistics.median(values[1:]) for name, values in times.items()}
        row: dict[str, Any] = {"case": str(case), "mode": mode, "seconds": seconds}
        if mode == "train":
            row["saved_bytes"] = {name: saved_bytes(model, x) for name, model in taking_part.items()}
        rows.append(row)
    return rows


def timed(model: nn.Module, x: Tensor, mode: str) -> float:
    """Seconds of `run_once`."""
    start = time.perf_counter()
    run_once(model, x, mode)
    return time.perf_counter() - start


def show(rows: list[dict[str, Any]]) -> None:
    """One table of ratios over the dense limit, one of what is kept for the backward."""
    ratios = [
        {
            "case": row["case"],
            "mode": row["mode"],
            "dense (ms)": 1000 * row["seconds"]["dense"],
            **{name: value / row["seconds"]["dense"] for name, value in row["seconds"].items() if name != "dense"},
        }
        for row in rows
    ]
    columns = list(dict.fromkeys(key for row in ratios for key in row))
    print_table("Time over the dense limit, medians", ratios, columns)
    memory = [
        {"case": row["case"], **{name: value / 2**20 for name, value in row["saved_bytes"].items()}}
        for row in rows
        if "saved_bytes" in row
    ]
    print_table("Kept for the backward (MiB)", memory, list(dict.fromkeys(key for row in memory for key in row)))


def main() -> None:
    """Measure and show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the medians to this file")
    parser.add_argument("--case", choices=[str(case) for case in CASES], help="only this shape")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each contender")
    parser.add_argument("--backends", nargs="*", default=[], help="also measure these backends of ours by name")
    options = parser.parse_args()
    rows = []
    for case in CASES:
        if options.case in (None, str(case)):
            rounds = options.rounds * (10 if case.tokens <= 16 else 1)
            rows += measure(case, rounds, options.backends)
    show(rows)
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
