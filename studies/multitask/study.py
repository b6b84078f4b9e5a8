"""SMoRA, MoLA and other mixtures of LoRA experts beside plain LoRA, on nine tasks at once, over seeds.

    python -m studies.multitask.study --tune                  short runs that choose each method's learning rate
    python -m studies.multitask.study                         run what is missing, then write the tables and the figure
    python -m studies.multitask.study --methods smora lora-r64 --seeds 0 1
    python -m studies.multitask.study --only table            only write them
    python -m studies.multitask.study --release smora-dropout --seed 0 --commit COMMIT --out FOLDER    a checkpoint

Every (method, seed) is one JSON file in `results/`, every trial of a rate one in `trials/`; what has one is not run
again. Rates are chosen by half of what is held out of four tasks; the other half is tested beside their test part.
"""

import argparse
import json
import resource
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch

from studies.multitask.methods import (
    HEAD_RATES,
    HEADS,
    LONGER,
    MAIN,
    METHODS,
    PAIRS,
    PRIMARY,
    RATES,
    ROUTER_RATE,
    SHOWN,
    Method,
    tuned_as,
)
from studies.options import add_release_options, read_options, study_parser
from studies.release import find_run, result_of, save_released
from studies.rows import Row, is_done, write_whole
from tasks.multitask.data import SPLIT_SEED, MultitaskDataModule
from tasks.multitask.encode import TaskDataset
from tasks.multitask.evaluate import (
    AVERAGE,
    AVERAGE_GLUE,
    GLUE,
    Labels,
    Report,
    ScoredTask,
    normalise_loads,
)
from tasks.multitask.examples import cap_tasks, hold_out
from tasks.multitask.model import MultitaskModel
from tasks.multitask.plots import plot_scores
from tasks.multitask.task import Answers, MultitaskTask
from zoo import hub
from zoo.base_models import MINILM
from zoo.callbacks import EpochSeed
from zoo.comparison import Array, Comparison, draw
from zoo.errors import DataNotFoundError
from zoo.moe import TopKRouter, group_dependence, routed_modules
from zoo.report import print_table

FOLDER = Path(__file__).parent
SEEDS = (0, 1, 2)
# Of the trials, which no run of the table has.
TRIAL_SEED = 100
# What is scored: examples that rates are chosen by, and those that nothing is.
VAL, TEST = "val", "test"
# Share of what the tasks that decide have to learn from that is held out; a run sees about four fifths of the rest.
HOLDOUT = 0.3
# Plain LoRA of as many ranks as a mixture has in all.
TWIN = "lora-r64"
# What a released network says of what it was made with.
TERMS = {"data_terms": "mixed, several state none", "weights_licence": "Apache-2.0"}
# Permutations that measure chance.
PERMUTATIONS = 50


class Run(NamedTuple):
    """A method with its learning rate and seed; a trial is short, and scored by validation alone."""

    method: str
    lr: float
    seed: int
    trial: bool = False

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.method}.lr{self.lr:g}" if self.trial else f"{self.method}.seed{self.seed}"


# --- running ---------------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace, one: Run) -> Row:
    """Train and score: a trial by what chooses rates, a run of the table by the test, a longer one by both."""
    data = load_data(options.source, options.batch_size, options.score_limit)
    data.seed = one.seed
    data.epoch_size = data.batch_size * steps_of(options, one)
    task = build(options, one)
    facts = train(options, one, task, data)
    task.model.eval()
    return {**facts, **count_parameters(task.model), **{part: judge(task, data, part) for part in parts_of(one)}}


def parts_of(one: Run) -> tuple[str, ...]:
    """What a run is scored by; of the longer ones validation chooses what is released."""
    if one.trial:
        return (VAL,)
    return (VAL, TEST) if METHODS[one.method].times > 1 else (TEST,)


def steps_of(options: argparse.Namespace, one: Run) -> int:
    """For how many steps a run learns."""
    return int(options.trial_steps) if one.trial else int(options.steps) * METHODS[one.method].times


def build(options: argparse.Namespace, one: Run) -> MultitaskTask:
    """A new network, drawn by the run's seed."""
    pl.seed_everything(one.seed, verbose=False)
    return MultitaskTask(network(options, METHODS[one.method]), **rates_of(options, one))


def rates_of(options: argparse.Namespace, one: Run) -> dict[str, float]:
    """Those of adapters, heads and routers.

    Raises:
        DataNotFoundError: The rate of the heads has not been chosen.
    """
    heads = one.lr if one.method == HEADS else chosen_rate(options, HEADS)
    return {"lr": one.lr, "head_lr": heads, "router_lr": ROUTER_RATE}


def network(options: argparse.Namespace, method: Method) -> dict[str, Any]:
    """Arguments of `MultitaskModel`."""
    return {"base": options.base, "method": method.method, "adapter": dict(method.adapter) or None}


def make_data(source: Literal["nlp_tasks", "generated"], batch_size: int) -> MultitaskDataModule:
    """The examples, not read yet; tasks share rows, since options of the choice tasks would be most of what is read."""
    return MultitaskDataModule(
        source=source, holdout=HOLDOUT, sampling="temperature", share_rows=True, batch_size=batch_size
    )


@cache
def load_data(source: Literal["nlp_tasks", "generated"], batch_size: int, score_limit: int) -> MultitaskDataModule:
    """The same, read once for all runs.

    Args:
        source: Of `MultitaskDataModule`.
        batch_size: Likewise.
        score_limit: Test examples of a task that is not of GLUE.
    """
    data = make_data(source, batch_size)
    data.setup("fit")
    data.setup("test")
    deciding = [name for name in data.learned if name in GLUE] or list(data.learned)
    held_out = [example for example in data.examples[VAL] if example.task in deciding]
    data.examples["train"] += [example for example in data.examples[VAL] if example.task not in deciding]
    tested, data.examples[VAL] = hold_out(held_out, 0.5, SPLIT_SEED)
    whole = [example for example in data.examples[TEST] if example.task in GLUE]
    others = [example for example in data.examples[TEST] if example.task not in GLUE]
    data.examples[TEST] = [*whole, *tested, *cap_tasks(others, score_limit, SPLIT_SEED)]
    return data


def describe_data(source: Literal["nlp_tasks", "generated"], batch_size: int) -> Row:
    """What a row has to say about the examples."""
    arguments = make_data(source, batch_size).hparams
    return {name: arguments[name] for name in ("cap", "holdout", "sampling", "temperature", "share_rows", "max_length")}


def train(options: argparse.Namespace, one: Run, task: MultitaskTask, data: MultitaskDataModule) -> Row:
    """Train a network; the task saves it as a checkpoint in the run's folder."""
    pl.seed_everything(one.seed, verbose=False)
    timer = pl.callbacks.Timer()
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        gradient_clip_val=1.0,
        callbacks=[EpochSeed(one.seed), timer],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=checkpoint(options, one).parent,
    )
    trainer.fit(task, data)
    return {
        "train_seconds": round(timer.time_elapsed("train"), 1),
        "steps": trainer.global_step,
        # Of the process until now, the runs before this one included.
        "process_peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def checkpoint(options: argparse.Namespace, one: Run) -> Path:
    """Where the checkpoint of a run is."""
    return Path(options.folder) / "runs" / f"{options.source}.{one.name}" / "checkpoint"


def count_parameters(model: MultitaskModel) -> Row:
    """Trained parameters, and of the adapter's those that one token uses: routers, and the experts it is sent to."""
    heads = sum(parameter.numel() for parameter in model.heads.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    idle = 0
    for mixture in routed_modules(model).values():
        router: Any = mixture.router
        if isinstance(router, TopKRouter):
            share = 1 - router.top_k / router.num_experts
            own: Any = mixture
            # What all experts share is never idle.
            weights = [own.lora_B] + [own.lora_A] * (len(own.lora_A) == own.lora_B.shape[1])
            idle += round(share * sum(weight.numel() for weight in weights))
    return {"parameters_trained": trained, "parameters_active": trained - heads - idle}


def judge(task: MultitaskTask, data: MultitaskDataModule, part: str) -> Row:
    """Right and predicted number and loss of every example by task, and how much tasks explain of routing."""
    dataset: TaskDataset = data.require(f"{part}_set")  # type: ignore[assignment]
    answers = Answers.of(dataset)
    for batch in data.loader(dataset):
        task.answer(dataset, batch, answers, watch=part == TEST and task.model.routed)
    tasks, predictions = task.judged(dataset, answers, data)
    of_task = np.array([example.task for example in dataset.examples])
    losses = {of.name: np.array(answers.losses)[of_task == of.name] for of in tasks}
    row: Row = {
        "tasks": {
            of.name: {
                "metric": of.metric,
                "positive": of.positive,
                "target": digits(of.targets),
                "predicted": digits(predictions[of.name]),
                "loss": round(float(losses[of.name].mean()), 5),
            }
            for of in tasks
        }
    }
    if part == TEST:
        for name, found in losses.items():
            row["tasks"][name]["losses"] = " ".join(f"{loss:.3f}" for loss in found)
    if answers.loads:
        explained = group_dependence(normalise_loads(answers.loads), of_task.tolist(), PERMUTATIONS)
        row["task_dependence"] = {module: [round(value, 5) for value in of] for module, of in explained.items()}
    return row


def digits(numbers: Labels) -> str:
    """Numbers in one line."""
    return " ".join(map(str, numbers.tolist()))


# --- rows ------------------------------------------------------------------------------------------------------------


def result_path(options: argparse.Namespace, one: Run) -> Path:
    """Where the row of a run is."""
    return Path(options.folder) / ("trials" if one.trial else "results") / f"{options.source}.{one.name}.json"


def describe(options: argparse.Namespace, one: Run) -> Row:
    """What a row is about; one about anything else is not that of the run."""
    names = ("source", "base", "batch_size", "score_limit")
    setting = asdict(METHODS[one.method])
    # Which the number of steps and the rate tell.
    del setting["times"], setting["rate_share"]
    return {
        **{name: getattr(options, name) for name in names},
        "trial_steps" if one.trial else "steps": steps_of(options, one),
        **describe_data(options.source, options.batch_size),
        **one._asdict(),
        **rates_of(options, one),
        "setting": setting,
    }


def run_missing(options: argparse.Namespace, runs: Sequence[Run]) -> None:
    """Run everything without a row."""
    torch.set_num_threads(options.threads)
    for one in runs:
        path, about = result_path(options, one), describe(options, one)
        if is_done(path, about):
            continue
        print(f"{options.source}, {one.name}", flush=True)
        start = time.perf_counter()
        row = run(options, one)
        write_whole(path, {**about, "seconds": round(time.perf_counter() - start, 1), **row})


def tune(options: argparse.Namespace) -> None:
    """Try every rate for every method, as often for one as for another; heads come first, as all others have theirs."""
    methods = list(dict.fromkeys([HEADS, *map(tuned_as, options.methods)]))
    for method in methods:
        run_missing(options, trials_of(method))
    lines = [
        {"method": method} | {f"{lr:g}": loss for lr, loss in losses_of(options, method).items()} for method in methods
    ]
    columns = ["method", *(f"{lr:g}" for lr in sorted({*HEAD_RATES, *RATES}))]
    print_table(f"{options.source}: loss in validation by learning rate", lines, columns)


def trials_of(method: str) -> list[Run]:
    """One for each rate."""
    return [Run(method, lr, TRIAL_SEED, True) for lr in (HEAD_RATES if method == HEADS else RATES)]


def losses_of(options: argparse.Namespace, method: str) -> dict[float, float]:
    """The loss in validation by rate; nothing where a trial is missing.

    Raises:
        ValueError: A trial is about another setting.
    """
    trials = trials_of(tuned_as(method))
    if not all(result_path(options, one).is_file() for one in trials):
        return {}
    return {one.lr: validated(options, one) for one in trials}


def validated(options: argparse.Namespace, one: Run) -> float:
    """The loss of a trial in validation."""
    return mean_loss(read(options, one)[VAL])


def mean_loss(scored: Row) -> float:
    """Mean over tasks of their mean cross entropies: those of GLUE, where differences can show, else all of them.

    Args:
        scored: What `judge` found.
    """
    return float(np.mean([scored["tasks"][name]["loss"] for name in deciding(scored)]))


def deciding(scored: Row) -> list[str]:
    """The tasks where differences can show.

    Args:
        scored: What `judge` found.
    """
    return [name for name in scored["tasks"] if name in GLUE] or list(scored["tasks"])


def chosen_rate(options: argparse.Namespace, method: str) -> float:
    """The rate with the lowest loss in validation.

    Raises:
        DataNotFoundError: Not all rates have been tried.
    """
    found = losses_of(options, method)
    if not found:
        hint = f"Choose it: python -m studies.multitask.study --tune --methods {tuned_as(method)}"
        raise DataNotFoundError(
            f"the learning rate of {method}", [result_path(options, trials_of(tuned_as(method))[0])], hint
        )
    return min(found, key=found.__getitem__)


def tuned(options: argparse.Namespace) -> list[str]:
    """Methods of which all rates have been tried."""
    return [method for method in METHODS if losses_of(options, method)]


def runs_of(options: argparse.Namespace, methods: Sequence[str]) -> list[Run]:
    """Those of the table, one seed of all methods before the next.

    Raises:
        DataNotFoundError: A method has no rate yet.
    """
    found = {method: round(chosen_rate(options, method) * METHODS[method].rate_share, 8) for method in methods}
    return [Run(method, found[method], seed) for seed in options.seeds for method in methods]


def read(options: argparse.Namespace, one: Run) -> Row:
    """The row of a run.

    Raises:
        ValueError: It is about another setting.
    """
    path = result_path(options, one)
    is_done(path, describe(options, one))
    row: Row = json.loads(path.read_text())
    return row


def read_rows(options: argparse.Namespace) -> dict[str, list[Row]]:
    """By method the rows of those seeds that have one.

    Raises:
        ValueError: One is about another setting.
    """
    rows: dict[str, list[Row]] = {}
    for one in runs_of(options, tuned(options)):
        if is_done(result_path(options, one), describe(options, one)):
            rows.setdefault(one.method, []).append(read(options, one))
    # In the order of the methods, not of the seeds.
    return {method: rows[method] for method in METHODS if method in rows}


# --- tables ----------------------------------------------------------------------------------------------------------


def numbers(text: str) -> Labels:
    """A line of numbers."""
    return np.array(text.split(), dtype=np.int64)


def make_report(rows: Mapping[str, Sequence[Row]], part: str) -> Report:
    """All methods on the same examples, from their rows.

    Args:
        rows: By method, one per seed.
        part: What is scored.

    Raises:
        ValueError: Two rows are about other examples.
    """
    found = [(method, row[part]["tasks"]) for method, of in rows.items() for row in of]
    first = found[0][1]
    for method, tasks in found:
        if {name: of["target"] for name, of in tasks.items()} != {name: of["target"] for name, of in first.items()}:
            raise ValueError(f"The rows of {method} and {found[0][0]} score other examples: run one of them again.")
    tasks = [ScoredTask(name, of["metric"], numbers(of["target"]), of["positive"]) for name, of in first.items()]
    return Report.of(
        tasks,
        {
            method: [{name: numbers(of["predicted"]) for name, of in row[part]["tasks"].items()} for row in of_method]
            for method, of_method in rows.items()
        },
    )


class Losses(Comparison):
    """Cross entropies of methods on the same examples: these tell them apart where scores of few examples cannot."""

    noun = "method"

    def __init__(self, rows: Mapping[str, Sequence[Row]]) -> None:
        """Read what was scored.

        Args:
            rows: By method, one per seed, of `read_rows`.
        """
        self.losses = {
            method: [
                np.array([row[TEST]["tasks"][name]["losses"].split() for row in of], dtype=np.float64)
                for name in deciding(of[0][TEST])
            ]
            for method, of in rows.items()
        }
        random = np.random.default_rng(0)
        self.draws = [draw(found.shape[1], random) for found in next(iter(self.losses.values()))]

    def names(self) -> Collection[str]:
        """The methods."""
        return self.losses

    def metric_names(self) -> list[str]:
        """The mean over the tasks that decide."""
        return ["loss"]

    def values(self, model: str, key: str) -> Array:
        """As `Comparison.values`."""
        self.check(model, key)
        return np.mean([found.mean(axis=1) for found in self.losses[model]], axis=0)

    def resample(self, model: str, key: str) -> Array:
        """As `Comparison.resample`."""
        self.check(model, key)
        means = [draws @ found.T / found.shape[1] for draws, found in zip(self.draws, self.losses[model], strict=True)]
        return np.mean(means, axis=0)


def table(rows: Mapping[str, Sequence[Row]], report: Report) -> list[Row]:
    """One line per method: means over seeds with their deviation, sizes and times; the last is the majority class."""
    lines = []
    for method in report.predictions:
        of = rows.get(method, [])
        line: Row = {"method": method, "what": METHODS[method].what if of else "best constant answer", "seeds": len(of)}
        for key in report.metric_names():
            values = report.values(method, key)
            line |= {key: float(values.mean()), f"{key} std": float(values.std(ddof=1)) if len(values) > 1 else 0.0}
        if of:
            losses = [mean_loss(row[TEST]) for row in of]
            line |= {"loss": float(np.mean(losses)), "loss std": float(np.std(losses, ddof=1)) if len(of) > 1 else 0.0}
            line |= {name: of[0][name] for name in ("lr", "steps", "parameters_trained", "parameters_active")}
            if VAL in of[0]:
                line["val_loss"] = float(np.mean([mean_loss(row[VAL]) for row in of]))
            line["train_seconds"] = float(np.mean([row["train_seconds"] for row in of]))
        explained = [value[0] for row in of for value in row[TEST].get("task_dependence", {}).values()]
        chance = [value[1] for row in of for value in row[TEST].get("task_dependence", {}).values()]
        if explained:
            line |= {"task_dependence": float(np.mean(explained)), "chance": float(np.mean(chance))}
        lines.append(line)
    return lines


def differences(report: Report, losses: Losses) -> list[Row]:
    """How much a method is above another, with 95 % intervals over examples and seeds; Holm's p of the primary ones."""
    lines = [
        {"compared": f"{first} - {second}", "primary": (first, second) in PRIMARY, **row}
        for first, second in PAIRS
        if {first, second} <= report.predictions.keys()
        for row in [*report.difference_rows(first, second), *losses.difference_rows(first, second)]
    ]
    key = AVERAGE_GLUE if AVERAGE_GLUE in report.metric_names() else AVERAGE
    decided = [line for line in lines if line["primary"] and line["metric"] == key]
    if len(decided) < len(PRIMARY):
        # Of a part of them it would promise too much.
        return lines
    for line, value in zip(decided, holm([line["p_value"] for line in decided]), strict=True):
        line["holm"] = value
    return lines


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number by Holm's step-down method (Holm 1979)."""
    order = np.argsort(p_values)
    steps = np.array(p_values)[order] * (len(p_values) - np.arange(len(p_values)))
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return [float(value) for value in adjusted]


def write_tables(options: argparse.Namespace) -> None:
    """Print and write the tables, and draw the figure."""
    rows = read_rows(options)
    if not rows:
        raise DataNotFoundError("results", [options.folder / "results"], "Run the study without --only table.")
    report = make_report(rows, TEST)
    results: dict[str, Any] = {
        "rates": {name: losses_of(options, name) for name in tuned(options)},
        TEST: table(rows, report),
        "differences": differences(report, Losses(rows)),
    }
    print_table(f"{options.source}, percent", results[TEST], ["method", "seeds", *report.main_names(), "loss"])
    averages = [row for row in results["differences"] if "/" not in row["metric"]]
    print_table(f"{options.source}: differences of averages", averages)
    write_whole(options.folder / "results.json", results)
    if methods := [method for method in SHOWN if method in rows]:
        print(plot_scores(report, options.folder / "scores.png", methods))


# --- a checkpoint ----------------------------------------------------------------------------------------------------


def release(options: argparse.Namespace) -> Path:
    """One run as a checkpoint in half precision, whose metadata hold the results of all other methods."""
    (one,) = [run for run in runs_of(options, [options.release]) if run.seed == options.seed]
    folder = find_run(checkpoint(options, one), one.method, one.seed)
    rows = read_rows(options)
    report = make_report(rows, TEST)
    by_seeds: dict[tuple[int, ...], list[str]] = {}
    for method, of in rows.items():
        by_seeds.setdefault(tuple(row["seed"] for row in of), []).append(method)
    results = [
        result_of(
            "studies.multitask.study",
            options,
            {f"{method}/{key}": value for method in methods for key, value in report.metrics(method).items()},
            methods,
            seeds,
        )
        for seeds, methods in by_seeds.items()
    ]
    card = replace(hub.info(folder).card, results=results, verdict=verdict(report, one.method), **TERMS)
    return save_released(hub.load_as(folder, MultitaskModel), folder, options.out, card)


def verdict(report: Report, method: str) -> str:
    """Whether a mixture paid: how far it is above LoRA of as many ranks and steps, the best of its runs; "" without."""
    ends = LONGER if method.endswith(LONGER) else ("",)
    twins = [TWIN + end for end in ends if TWIN + end in report.predictions]
    if not twins or method in twins:
        return ""
    key = AVERAGE_GLUE if AVERAGE_GLUE in report.metric_names() else AVERAGE
    twin = max(twins, key=lambda name: report.values(name, key).mean())
    found = report.difference(method, twin, key)
    paid, seeds = "paid" if found.low > 0 else "did not pay", len(report.values(method, key))
    return (
        f"Against {METHODS[twin].what}, trained alike over {seeds} seed{'s' * (seeds > 1)}, the difference in "
        f"{key} is {found.mean:+.1f} [{found.low:+.1f}, {found.high:+.1f}]: the mixture {paid}."
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = study_parser(__doc__, FOLDER, METHODS, ["nlp_tasks", "generated"], SEEDS, MAIN)
    add_release_options(parser)
    parser.add_argument("--base", default=MINILM, help="the encoder")
    parser.add_argument("--steps", type=int, default=800, help="of a run")
    parser.add_argument("--trial-steps", type=int, default=400, help="of a trial")
    parser.add_argument("--batch-size", type=int, default=16, help="examples of a step")
    parser.add_argument("--score-limit", type=int, default=400, help="test examples of a task that decides nothing")
    parser.add_argument("--tune", action="store_true", help="choose learning rates on validation, test nothing")
    options = read_options(parser, arguments, METHODS)
    if options.release:
        options.seeds = sorted({*options.seeds, options.seed})
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Tune, or run what is missing and write the results, or write a checkpoint."""
    options = parse(arguments)
    if options.release:
        print(release(options))
    elif options.tune:
        tune(options)
    else:
        if not options.only:
            run_missing(options, runs_of(options, options.methods))
        write_tables(options)


if __name__ == "__main__":
    main()
