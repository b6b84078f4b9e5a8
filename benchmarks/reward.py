"""Time of scoring pairs of answers by a mixture of capability LoRAs, against one LoRA and against separate passes.

    python -m benchmarks.reward [--json FILE] [--rounds N] [--batch TEXTSxTOKENS] [--experts T]

All adapt the same encoder of MiniLM's size with random weights, from tokens to rewards, and take turns in one process;
the table shows medians and ratios over `single`, one LoRA and a head.

- In the last layer: `inner` is one inner model of T capability experts on one shared prefix, `dmoerm` six of them with
  the router, which reads every prompt (of half as many tokens) once for its two answers, `separate` T models of one
  LoRA one after another.
- In every layer the base itself runs once per expert: `single-all` is one LoRA, `stacked-all` T of them in one pass,
  `separate-all` the same ones one after another.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.qa import save_base, sizes, take_turns
from tasks.reward.backbone import Backbone, Inputs, pool_states
from tasks.reward.baselines import LoraEnsemble
from tasks.reward.model import DMoERM
from zoo.report import print_table

RANK, GROUPS = 8, 6
# How much longer than one LoRA it may take.
TARGETS = {"inner": 1.5}


class Texts:
    """Pairs of answers of random tokens without padding, and their prompts of half as many tokens.

    Attributes:
        ids: `(B, L)`; all first answers, then all second ones.
        prompts: `(B / 2, L / 2)`.
    """

    def __init__(self, rows: int, tokens: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(1000, 30000, (rows, tokens), generator=generator)
        self.prompts = torch.randint(1000, 30000, (rows // 2, tokens // 2), generator=generator)

    @torch.no_grad()
    def score(self, model: Backbone) -> Tensor:
        """Rewards, or the scores of an ensemble's members, `(B, N)`."""
        mask = torch.ones_like(self.ids, dtype=torch.bool)
        hidden = model.prefix(self.ids, mask, torch.zeros_like(self.ids))
        prompts = hidden.new_zeros(len(hidden), model.prompt_width)
        if model.reads_prompts:
            real = torch.ones_like(self.prompts, dtype=torch.bool)
            prompts = model.read_prompts(self.prompts, real).repeat(2, 1)
        means = pool_states(hidden, mask, torch.ones_like(self.ids))
        reading = model.read(Inputs(hidden, mask, means, prompts, torch.full((len(hidden),), -1)))
        return reading.scores if isinstance(model, LoraEnsemble) else reading.reward[:, None]

    def score_all(self, models: Sequence[Backbone]) -> Tensor:
        """The scores of models one after another, `(B, N)`."""
        return torch.cat([self.score(model) for model in models], dim=1)


def mixture(base: str, experts: int, groups: int) -> DMoERM:
    """DMoERM with its capability experts in the last layer."""
    names = [f"capability {number}" for number in range(experts)]
    return DMoERM({f"group {number}": [f"category {number}"] for number in range(groups)}, names, base).eval()


def members(base: str, count: int, layers: int) -> LoraEnsemble:
    """LoRAs that do something, as those that are trained do."""
    model = LoraEnsemble(count, base=base, layers=layers, rank=RANK).eval()
    generator = torch.Generator().manual_seed(0)
    for stack in model.experts.stacks.values():
        torch.nn.init.normal_(stack.lora_B, std=0.02, generator=generator)  # type: ignore[arg-type]
    return model


def alone(base: str, together: LoraEnsemble) -> list[LoraEnsemble]:
    """The same members as models of their own."""
    models = [LoraEnsemble(1, base=base, layers=together.layers, rank=RANK).eval() for _ in range(together.members)]
    for number, model in enumerate(models):
        state = {name: value[number : number + 1] for name, value in together.experts.state_dict().items()}
        model.experts.load_state_dict(state)
    return models


def measure(base: str, size: str, experts: int, rounds: int) -> dict[str, Any]:
    """Medians of all contenders."""
    texts = Texts(*sizes(size))
    last, every = members(base, experts, 1), members(base, experts, 0)
    separate, separate_all = alone(base, last), alone(base, every)
    for together, apart in ((last, separate), (every, separate_all)):
        # The same numbers, or their times mean nothing.
        torch.testing.assert_close(texts.score(together), texts.score_all(apart), atol=1e-3, rtol=1e-3)
    inner, dmoerm = mixture(base, experts, 1), mixture(base, experts, GROUPS)
    calls = {
        "single": lambda: texts.score(separate[0]),
        "inner": lambda: texts.score(inner),
        "dmoerm": lambda: texts.score(dmoerm),
        "separate": lambda: texts.score_all(separate),
        "single-all": lambda: texts.score(separate_all[0]),
        "stacked-all": lambda: texts.score(every),
        "separate-all": lambda: texts.score_all(separate_all),
    }
    return {"case": f"{size} T{experts}", "mode": "inference", "seconds": take_turns(calls, rounds)}


def main() -> None:
    """Measure, print a table, and write the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", default="16x256", help="texts x tokens")
    parser.add_argument("--experts", type=int, default=5, help="T, capability experts")
    options = parser.parse_args()
    if sizes(options.batch)[0] % 2:
        parser.error(f"--batch {options.batch}: texts come in pairs, so that there must be an even number of them")
    with tempfile.TemporaryDirectory() as base:
        save_base(base)
        row = measure(base, options.batch, options.experts, options.rounds)
    seconds = row["seconds"]
    lines = [
        {
            "model": name,
            "ms": 1e3 * seconds[name],
            "over single": seconds[name] / seconds["single"],
            "allowed": TARGETS.get(name, ""),
            "over single-all": seconds[name] / seconds["single-all"] if name.endswith("-all") else "",
        }
        for name in seconds
    ]
    print_table(f"{row['case']}, {torch.get_num_threads()} threads", lines)
    stacked = seconds["stacked-all"]
    print(
        f"Every layer: one stacked pass takes {stacked / seconds['separate-all']:.2f} of {options.experts} separate "
        f"ones, and {stacked / seconds['single-all'] / options.experts:.2f} of T times one LoRA."
    )
    if options.json:
        options.json.write_text(json.dumps({"rows": [row]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
