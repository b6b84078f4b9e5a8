"""Does each paper's claim hold? Every router in one small transformer, on text whose domains are known.

    python -m studies.routers.study                          run what is missing, then write the table and the figure
    python -m studies.routers.study --objective causal       the same for causal models
    python -m studies.routers.study --methods top2 switch --seeds 0 1
    python -m studies.routers.study --only table             only write table and figure

Every (objective, method, seed) is one JSON file in `results/`; what has one is not run again.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor, nn

from studies.routers.claims import CLAIMS, judge
from studies.routers.data import Batch, Corpus, Objective, load_corpus, make_batch
from studies.routers.measure import evaluate
from studies.routers.methods import BY_FORWARD, BY_WINDOW, METHODS, Method
from studies.routers.model import LanguageModel, Sizes
from studies.rows import Row, is_done, mean_and_std, write_whole
from zoo.callbacks import GateTemperature
from zoo.errors import UnknownNameError
from zoo.moe import (
    DenseToSparseRouter,
    MoELayer,
    NullExpertRouter,
    StableMoERouter,
    collect_aux_losses,
    consistency_step,
    open_count_windows,
    update_selection_biases,
)
from zoo.report import PALETTE, plot_style, print_table, save_figure
from zoo.task import warmup_cosine

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FOLDER = Path(__file__).parent
SEEDS = (0, 1, 2)
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)

# Methods whose tokens have different numbers of experts.
DYNAMIC = ("top-p", "null", "retrofit-null")


@dataclass(frozen=True, slots=True)
class Budget:
    """What every run of one kind of data gets."""

    sizes: dict[str, int]
    length: int = 64
    batch_size: int = 16
    vocab_size: int = 1024
    max_val: int = 512
    lr: float = 4e-3
    weight_decay: float = 0.01
    warmup: float = 0.1
    max_norm: float = 1.0
    steps: int = 600


BUDGETS = {
    "qa": Budget({}),
    "generated": Budget({"dim": 16, "layers": 4, "heads": 2, "active": 16, "total": 64}, length=16, max_val=16),
}


class Trainer:
    """One run: a method with a seed on a corpus."""

    def __init__(
        self, method: Method, seed: int, corpus: Corpus, budget: Budget, steps: int, objective: Objective
    ) -> None:
        """Build the model and its optimiser.

        Args:
            method: One of `METHODS`.
            seed: Of weights, order, masks and noise; order and masks are the same for all methods.
            corpus: The data.
            budget: Sizes and rates.
            steps: Optimiser steps.
            objective: What is learned.
        """
        torch.manual_seed(seed)
        sizes = Sizes(
            vocab_size=corpus.vocab_size,
            length=budget.length,
            frequencies=corpus.frequencies(objective),
            causal=objective == "causal",
            **budget.sizes,
        )
        self.method, self.corpus, self.budget, self.steps, self.objective = method, corpus, budget, steps, objective
        self.model = LanguageModel(sizes, method.design)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=budget.lr, weight_decay=budget.weight_decay)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: warmup_cosine(step, steps, budget.warmup)
        )
        self.order = torch.Generator().manual_seed(seed)
        self.seen = 0

    def run(self) -> Row:
        """Train and measure."""
        self.model.train()
        seconds = []
        for step in range(self.steps):
            index = torch.randint(len(self.corpus.train.ids), (self.budget.batch_size,), generator=self.order)
            batch = make_batch(self.corpus.train.ids[index], self.objective, self.order)
            start = time.perf_counter()
            train_loss = self.step(step, batch)
            seconds.append(time.perf_counter() - start)
        numbers = evaluate(self.model, self.corpus, self.objective, self.budget.batch_size, seed=0)
        return {"train_loss": train_loss, **numbers, "seconds_per_step": statistics.median(seconds)}

    def step(self, step: int, batch: Batch) -> float:
        """One optimiser step; returns the loss without auxiliary losses."""
        self.follow_schedules(step)
        self.optimizer.zero_grad()
        total = 0.0
        for part in batch.split(self.method.micro_batch or self.budget.batch_size):
            if self.method.window and self.seen % self.method.window == 0:
                open_count_windows(self.model)
            self.seen += len(part.ids)
            share = len(part.targets) / len(batch.targets)
            task_loss, loss = self.losses(part)
            (share * loss).backward()
            total += share * float(task_loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.budget.max_norm)
        self.optimizer.step()
        self.schedule.step()
        if self.method.bias_rate:
            update_selection_biases(self.model, self.method.bias_rate)
        return total

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss of the task, and what is minimised."""

        def task_loss(logits: Tensor) -> Tensor:
            return nn.functional.cross_entropy(logits, batch.targets)

        def run() -> Tensor:
            logits: Tensor = self.model(batch.ids, batch.scored)
            return logits

        if self.method.consistency:
            loss, logits = consistency_step(run, task_loss, self.method.consistency)
            return task_loss(logits.detach()), loss
        loss = task_loss(run())
        return loss.detach(), loss + collect_aux_losses(self.model).total

    def follow_schedules(self, step: int) -> None:
        """Cool gates that go from dense to sparse, freeze distilled ones, give trained ones null experts."""
        if self.method.cooling:
            ramp, sparse = (max(1, round(share * self.steps)) for share in self.method.cooling)
            temperature = GateTemperature(steps=ramp, sparse_after=sparse).temperature(step)
            for router in self.model.modules():
                if isinstance(router, DenseToSparseRouter):
                    router.set_temperature(temperature)
        if self.method.freeze is not None and step >= self.method.freeze * self.steps:
            for router in self.model.modules():
                if isinstance(router, StableMoERouter):
                    router.freeze()
        if self.method.retrofit is not None and step == round(self.method.retrofit * self.steps):
            self.add_null_experts()

    def add_null_experts(self) -> None:
        """Let every trained top-2 choose four of its experts and twice as many null ones (AdaMoE)."""
        for layer in self.model.modules():
            if isinstance(layer, MoELayer):
                old = layer.router
                number, width = old.weight.shape
                new = NullExpertRouter(width, number, top_k=4, num_null=2 * number)
                with torch.no_grad():
                    new.weight[:number] = old.weight
                layer.router = new
        self.optimizer.param_groups[0]["params"] = list(self.model.parameters())


def chosen_methods(names: Sequence[str] | None, objective: Objective) -> list[str]:
    """The methods to run: as named, or all that the objective allows.

    Raises:
        UnknownNameError: No method of that name.
        ValueError: A causal model cannot use it.
    """
    refused = {name for name, method in METHODS.items() if method.masked_only and objective == "causal"}
    for name in names or ():
        if name not in METHODS:
            raise UnknownNameError("method", name, METHODS)
        if name in refused:
            raise ValueError(f"--methods {name}: lets a token see later ones; run it with --objective masked.")
    return list(names) if names else [name for name in METHODS if name not in refused]


def result_path(folder: Path, objective: str, method: str, seed: int) -> Path:
    """Where the row of a run is."""
    return folder / "results" / f"{objective}.{method}.seed{seed}.json"


def run_missing(options: argparse.Namespace) -> None:
    """Run every (method, seed) without a row, all methods of a seed before the next."""
    budget = BUDGETS[options.data]
    steps = options.steps or budget.steps
    about = {"objective": options.objective, "data": options.data, "steps": steps}
    methods = chosen_methods(options.methods, options.objective)
    runs = [(method, seed) for seed in options.seeds for method in methods]
    paths = {run: result_path(options.folder, options.objective, *run) for run in runs}
    missing = [run for run in runs if not is_done(paths[run], about)]
    if not missing:
        return
    torch.set_num_threads(options.threads)
    cache = options.folder / "cache"
    corpus = load_corpus(options.data, budget.length, budget.vocab_size, budget.max_val, cache)
    for method, seed in missing:
        print(f"{options.objective}, {method}, seed {seed}", flush=True)
        row = Trainer(METHODS[method], seed, corpus, budget, steps, options.objective).run()
        write_whole(paths[method, seed], {**about, "method": method, "seed": seed, "threads": options.threads, **row})


def rows_of(folder: Path, objective: str, method: str) -> list[Row]:
    """All recorded rows of a method, over seeds."""
    paths = sorted((folder / "results").glob(f"{objective}.{method}.seed*.json"))
    return [json.loads(path.read_text()) for path in paths]


# Column of the table, and key of the rows whose mean it shows.
COLUMNS = {
    "experts/token": "active_experts",
    "load max/mean": "load_max_over_mean",
    "dead": "dead_experts",
    "specialisation": "specialisation",
    "shuffled": "specialisation_shuffled",
    "entropy": "entropy",
    "s/step": "seconds_per_step",
    "active": "parameters_active",
    "total": "parameters_total",
}


def table(folder: Path) -> list[Row]:
    """One line per objective and method: means over seeds, and the standard deviation of the loss."""
    lines = []
    for objective in OBJECTIVES:
        for method in METHODS:
            rows = rows_of(folder, objective, method)
            if not rows:
                continue
            loss, std = mean_and_std(rows, "val_loss")
            line = {"objective": objective, "method": method, "seeds": len(rows), "val loss": loss, "std": std}
            for column, key in COLUMNS.items():
                line[column] = None if rows[0][key] is None else mean_and_std(rows, key)[0]
            line["specialisation std"] = (
                None if rows[0]["specialisation"] is None else mean_and_std(rows, "specialisation")[1]
            )
            lines.append(line)
    return lines


def judge_all(folder: Path, objective: str) -> list[Row]:
    """Every claim that the rows of an objective can judge."""
    rows = {method: rows_of(folder, objective, method) for method in METHODS}
    judged = [judge(claim, rows) for claim in CLAIMS]
    return [{"objective": objective, **line} for line in judged if line]


def plot(folder: Path, lines: Sequence[Row], path: Path) -> Path:
    """Losses between the dense twins, specialisation over the balance batch, experts by difficulty.

    Args:
        folder: Of the rows.
        lines: Of the table.
        path: Of the figure.
    """
    from matplotlib.figure import Figure

    objectives = [name for name in OBJECTIVES if any(line["objective"] == name for line in lines)]
    with plot_style():
        figure = Figure(figsize=(4.5 * len(objectives) + 5, 8.5))
        panels = figure.subplot_mosaic([[*objectives, "curve"], [*objectives, "difficulty"]])
        for number, objective in enumerate(objectives):
            own = {line["method"]: line for line in lines if line["objective"] == objective}
            draw_losses(panels[objective], objective, own)
            draw_curve(panels["curve"], objective, own, number)
            draw_difficulty(panels["difficulty"], folder, objective, number)
        sizes = sorted({*BY_FORWARD, *BY_WINDOW})
        panels["curve"].set_xscale("log", base=2)
        panels["curve"].set_xticks(sizes, [str(size) for size in sizes])
        panels["curve"].set_xlabel("sequences over which the balance loss counts")
        panels["curve"].set_ylabel("domain specialisation")
        panels["difficulty"].set_xticks(range(4), ["easiest", "easier", "harder", "hardest"])
        panels["difficulty"].set_xlabel("quarter of the predicted tokens, by their loss")
        panels["difficulty"].set_ylabel("experts per token")
        for name in ("curve", "difficulty"):
            if panels[name].has_data():
                panels[name].legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize="small")
        return save_figure(figure, path)


def draw_losses(axes: "Axes", objective: str, lines: dict[str, Row]) -> None:
    """Mean and standard deviation of the loss, best on top; dashed lines are the dense twins."""
    ranked = sorted(lines.values(), key=lambda line: -line["val loss"])
    places = range(len(ranked))
    axes.errorbar(
        [line["val loss"] for line in ranked],
        places,
        xerr=[line["std"] for line in ranked],
        fmt="o",
        color=PALETTE[0],
    )
    for place, twin in enumerate(("dense-active", "dense-total")):
        if twin in lines:
            axes.axvline(lines[twin]["val loss"], color=PALETTE[place + 1], linestyle="--", label=twin)
    axes.set_yticks(places, [line["method"] for line in ranked])
    axes.set_xlabel("validation loss (nats)")
    axes.set_title(objective)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower left")


def draw_curve(axes: "Axes", objective: str, lines: dict[str, Row], number: int) -> None:
    """Specialisation over the size of the balance batch: each forward by itself, and windows of several."""
    for methods, style, words in ((BY_FORWARD, "o-", "each forward"), (BY_WINDOW, "s--", "window over forwards")):
        points = [(size, lines[method]) for size, method in methods.items() if method in lines]
        if points:
            axes.errorbar(
                [size for size, _ in points],
                [line["specialisation"] for _, line in points],
                yerr=[line["specialisation std"] for _, line in points],
                fmt=style,
                color=PALETTE[number],
                label=f"{objective}, {words}",
            )


def draw_difficulty(axes: "Axes", folder: Path, objective: str, number: int) -> None:
    """Experts per token over the quarters of difficulty, of the methods that choose how many."""
    for method, style in zip(DYNAMIC, ("o-", "s--", "^:"), strict=True):
        rows = rows_of(folder, objective, method)
        if rows:
            quarters = [
                statistics.fmean(values) for values in zip(*(row["active_by_difficulty"] for row in rows), strict=True)
            ]
            axes.plot(range(4), quarters, style, color=PALETTE[number], label=f"{objective}, {method}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", metavar="NAME", help=f"all by default: {', '.join(METHODS)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--steps", type=int, help="optimiser steps of every run; by default those of its data")
    parser.add_argument("--objective", choices=OBJECTIVES, default="masked")
    parser.add_argument("--data", choices=list(BUDGETS), default="qa", help="generated: tiny and synthetic, for tests")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where results/ and cache/ are")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--only", choices=["table"], help="run nothing")
    options = parser.parse_args(arguments)
    if options.data == "generated" and options.folder == FOLDER:
        parser.error("--data generated needs a --folder of its own: its results are not those of the study.")
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps {options.steps}: must be at least 1.")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing and write the results."""
    options = parse(arguments)
    if not options.only:
        run_missing(options)
    lines = table(options.folder)
    claims = [line for objective in OBJECTIVES for line in judge_all(options.folder, objective)]
    for title, rows in (("methods", lines), ("claims", claims)):
        for objective in OBJECTIVES:
            own = [row for row in rows if row["objective"] == objective]
            if own:
                print_table(f"{objective} language model: {title}", own, list(own[0])[1:])
    write_whole(options.folder / "results.json", {"methods": lines, "claims": claims})
    print(plot(options.folder, lines, options.folder / "routers.png"))


if __name__ == "__main__":
    main()
