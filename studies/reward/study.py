"""DMoERM beside single, ensembled and multi-objective reward models on the same pairs, over seeds.

    python -m studies.reward.study                         run what is missing, then write the tables and the figure
    python -m studies.reward.study --methods dmoerm single --seeds 0 1
    python -m studies.reward.study --part val --seeds 0    trials of settings, scored on held-out pairs
    python -m studies.reward.study --only table            only write them
    python -m studies.reward.study --release dmoerm --seed 0 --commit COMMIT --out FOLDER      a run as a checkpoint

Every (method, seed) is one JSON file in `results/`; what has one is not run again. `studies.reward.policy` goes on from
the networks that are left in `runs/`.
"""

import argparse
import json
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from inspect import signature
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray

from studies.options import add_release_options, read_options, study_parser
from studies.release import find_run, result_of, save_released
from studies.reward.methods import BASELINES, GOLD, GROUPS, MAIN, METHODS, PAIRS, READINGS, SHOWN, TRIALS, Method
from studies.reward.properties import regress
from studies.rows import Row, is_done, write_whole
from tasks.reward.backbone import ALPHA, PROMPT_DEPTHS, Backbone, Reading, stack_names
from tasks.reward.baselines import REDUCTIONS, LoraEnsemble, reduce_members
from tasks.reward.capabilities import CAPABILITIES, PREFERENCE_ITSELF, capability_preferences
from tasks.reward.data import PairDataset, RewardDataModule, limit_pairs, number_prompts
from tasks.reward.evaluate import PERCENT, POOLED, Report, confusion_matrix, length_differences
from tasks.reward.examples import Pair, prompt_key, split_by_prompt
from tasks.reward.groups import HARMLESS
from tasks.reward.judge import CausalJudge
from tasks.reward.model import GENERAL, DMoERM, InnerModel
from tasks.reward.plots import plot_consistency
from tasks.reward.task import LONGER, MODELS, ORACLE, RANDOM, RewardTask, astray, goals_of
from zoo import hub
from zoo.base_models import MINILM, SMOLLM2
from zoo.callbacks import EpochSeed
from zoo.comparison import Array
from zoo.errors import DataNotFoundError
from zoo.report import print_table

FOLDER = Path(__file__).parent
SEEDS = (0, 1, 2)
VAL, TEST = "val", "test"
# Share of the training pairs that settings are chosen by, beside the few of validation; and what draws them, another
# seed than that of what is held back for the aggregation.
VALIDATED, VALIDATION_SEED = 0.15, 7
# What a released network says of what it was made with.
TERMS = {"data_terms": "mixed, one of them states none", "weights_licence": "Apache-2.0"}
# Largest norm of a step's gradient.
CLIP = 1.0
# A reading of DMoERM without what its experts add.
TASK_MODEL = "task"
# What the slow ones are scored on: drawn from the part, the same for all.
SAMPLE = "sample"
# A property of answers, and what models are compared with in it.
REFUSAL, PEOPLE = "refusal", "people"


class Run(NamedTuple):
    """A method with its seed, scored on a part of the pairs."""

    method: str
    seed: int
    part: str = TEST

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.method}.seed{self.seed}" + (f".{self.part}" if self.part != TEST else "")


class StudyData(RewardDataModule):
    """The pairs of the study: more to validate on, fewer to learn from, or those that no other model learns from."""

    def __init__(
        self, validate: float = 0.0, learn: int | None = None, held_out: bool = False, **arguments: Any
    ) -> None:
        """Describe them.

        Args:
            validate: Share of the training pairs, by prompt and category, that are validated on too.
            learn: How many pairs are learned from; all by default.
            held_out: Whether the pairs of validation and test are learned from, in place of all others: for the gold
                reward.
            arguments: Of `RewardDataModule`.
        """
        super().__init__(**arguments)
        self.validate = validate
        self.learn = learn
        self.held_out = held_out

    def read_training(self) -> dict[str, list[Pair]]:
        """Pairs to learn from and held-out ones."""
        parts = super().read_training()
        if self.held_out:
            parts["train"], parts["val"] = parts["val"] + self.read("test"), parts["train"]
        if self.validate:
            parts["train"], more = split_by_prompt(parts["train"], self.validate, VALIDATION_SEED)
            parts["val"] += more
        if self.learn is not None:
            parts["train"] = limit_pairs(parts["train"], self.learn)
        return parts


# --- running ---------------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace, one: Run) -> Row:
    """Train and score."""
    method = METHODS[one.method]
    data = make_data(options, one)
    if method.kind == "judge":
        dataset = scored(options, one, data)
        return judge(CausalJudge(options.judge), sample(options, dataset.pairs), dataset)
    if method.kind == "properties":
        return count(data, scored(options, one, data))
    pl.seed_everything(one.seed, verbose=False)
    task = RewardTask(
        method.kind,
        {"base": options.base, **method.network},
        epochs=dict(method.epochs),
        cache=str(options.cache) if method.cached else None,
        **method.task,
    )
    facts = train(options, one, task, data)
    dataset = scored(options, one, data)
    places = sample(options, dataset.pairs) if method.sampled else list(range(len(dataset)))
    if not method.sampled:
        fill(task, dataset)
    return {**facts, **score(task, dataset, places)}


def make_data(options: argparse.Namespace, one: Run) -> StudyData:
    """What a run learns from."""
    arguments: dict[str, Any] = {
        "source": options.source,
        "base": options.base,
        "limit": options.limit,
        "seed": one.seed,
    }
    if one.part == VAL:
        arguments |= {"validate": VALIDATED}
    return StudyData(**{**arguments, **METHODS[one.method].data})


def scored(options: argparse.Namespace, one: Run, data: StudyData) -> PairDataset:
    """The pairs that a run is scored on; the gold reward has learned from those of all others, and gets theirs."""
    if data.held_out:
        dataset: PairDataset = data.require("val_set")  # type: ignore[assignment]
        return PairDataset(limit_pairs(dataset.pairs, options.gold_limit), *data.cutting)
    data.setup("validate" if one.part == VAL else "test")
    found: PairDataset = data.require(f"{one.part}_set")  # type: ignore[assignment]
    return found


def train(options: argparse.Namespace, one: Run, task: RewardTask, data: StudyData) -> Row:
    """Train a network; the task saves it as a checkpoint in the run's folder."""
    data.setup("fit")
    start = time.perf_counter()
    fill(task, data.require("train_set"))  # type: ignore[arg-type]
    filled = time.perf_counter() - start
    timer = pl.callbacks.Timer()
    trainer = pl.Trainer(
        max_epochs=len(task.plan),
        reload_dataloaders_every_n_epochs=1,
        accelerator="cpu",
        gradient_clip_val=CLIP,
        callbacks=[EpochSeed(one.seed), timer],
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=checkpoint(options, one).parent,
    )
    trainer.fit(task, data)
    task.model.eval()
    # One group needs no router, which is there nevertheless.
    parameters = {id(p): p.numel() for phase in task.plan for p in task.model.phase_parameters(phase)}
    inner = task.model.inner if isinstance(task.model, DMoERM) else []
    # Shared experts once.
    different = {id(model.experts): model for model in inner}.values()
    return {
        "prefix_seconds": round(filled, 1),
        "train_seconds": round(timer.time_elapsed("train"), 1),
        "steps": trainer.global_step,
        # The expert of the preference learns nothing.
        "parameters_trained": sum(parameters.values()) - sum(map(count_idle, different)),
        # Of the process until now, the runs before this one included.
        "process_peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def count_idle(model: InnerModel) -> int:
    """Parameters of the expert of the preference."""
    own = len(model.own) * sum(parameter.numel() for parameter in model.experts.parameters())
    return own // model.experts.count


@torch.no_grad()
def fill(task: RewardTask, dataset: PairDataset, batch_size: int = 32) -> None:
    """Compute what the frozen layers make of texts, unless it is kept, or is not to be; like lengths together."""
    order = np.argsort([len(text.ids) for text in dataset.texts]).tolist()
    for begin in range(0, len(order) if task.store else 0, batch_size):
        task.kept(task.store, task.model, dataset, order[begin : begin + batch_size])  # type: ignore[arg-type]


def checkpoint(options: argparse.Namespace, one: Run) -> Path:
    """Where the checkpoint of a run is."""
    return Path(options.folder) / "runs" / f"{options.source}.{one.name}" / "checkpoint"


def sample(options: argparse.Namespace, pairs: Sequence[Pair]) -> list[int]:
    """Positions of the pairs that what is slow is scored on: one of each prompt, since those of one are much alike."""
    different = {prompt_key(pair.prompt): pair for pair in pairs}
    kept = {pair.id for pair in limit_pairs(list(different.values()), options.sample)}
    return [place for place, pair in enumerate(pairs) if pair.id in kept]


# --- scoring ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def score(task: RewardTask, dataset: PairDataset, places: Sequence[int], batch_size: int = 32) -> Row:
    """By how much the chosen answer's reward is higher in each pair; where prompts are sent, and what experts know."""
    seconds, model = 0.0, task.model
    found: dict[str, list[float]] = {}
    routes: list[int] = []
    experts = Experts()
    for begin in range(0, len(places), batch_size):
        batch = dataset.collate(list(places[begin : begin + batch_size]))
        inputs = task.inputs(model, batch, dataset)
        start = time.perf_counter()
        reading = model.read(inputs)
        seconds += time.perf_counter() - start
        rewards = all_rewards(model, reading)
        if isinstance(model, DMoERM):
            own = reading
            if (task_rewards := rewards_of_task(model, reading)) is not None:
                rewards[TASK_MODEL] = task_rewards
            if model.general is not None:
                rewards[GENERAL] = reading.scores[:, -1]
            if model.reads_prompts:
                routes += reading.route[: len(batch)].tolist()
                own = model.read(inputs, oracle=True)
                rewards[ORACLE] = own.reward
                rewards[RANDOM] = model.read(astray(model, inputs, batch), oracle=True).reward
            experts.add(model, [dataset.pairs[row] for row in batch.rows], own.scores)
        for name, of in rewards.items():
            found.setdefault(name, []).extend((of[: len(batch)] - of[len(batch) :]).tolist())
    row = {"differences": {name: line(of) for name, of in found.items()}, **about(dataset.pairs, places)}
    if routes:
        row["groups"] = list(model.groups)
        row["wanted"] = line([model.group_of.get(dataset.categories[place], -1) for place in places])
        row["routes"] = line(routes)
    # Without what the frozen layers take, which is the same for all.
    return row | experts.row() | {"score_seconds": round(seconds, 1)}


def rewards_of_task(model: DMoERM, reading: Reading) -> torch.Tensor | None:
    """The rewards of the task models alone, which are the experts of the preference; None without these."""
    if not all(len(inner.own) for inner in model.inner):
        return None
    places = torch.cat([inner.own for inner in model.inner])[reading.route]
    return reading.scores.gather(1, places[:, None])[:, 0]


class Experts:
    """How often experts are right: about their own capability, those of the preference about people."""

    def __init__(self) -> None:
        """Begin."""
        self.right: dict[tuple[str, str], list[bool]] = {}

    def add(self, model: DMoERM, pairs: Sequence[Pair], scores: torch.Tensor) -> None:
        """Count a batch.

        Args:
            model: Theirs.
            pairs: P of them.
            scores: `(2P, S)` of the inner models of their own categories.
        """
        differences = scores[: len(pairs)] - scores[len(pairs) :]
        for pair, of in zip(pairs, differences, strict=True):
            group = model.group_of.get(pair.category, 0)
            names = model.score_names(group)
            measured = [name for name in names if name not in (PREFERENCE_ITSELF, GENERAL)]
            wanted = dict(zip(measured, capability_preferences([pair], measured)[0].tolist(), strict=True))
            for name, difference in zip(names, of.tolist(), strict=True):
                if clear := wanted.get(name, 1):
                    self.right.setdefault((list(model.groups)[group], name), []).append(difference * clear > 0)

    def row(self) -> Row:
        """In percent by inner model and capability; nothing without experts."""
        found: dict[str, dict[str, float]] = {}
        for (group, name), right in self.right.items():
            found.setdefault(group, {})[name] = round(float(PERCENT * np.mean(right)), 2)
        return {"experts": found} if found else {}


def all_rewards(model: Backbone, reading: Reading) -> dict[str, torch.Tensor]:
    """The rewards of a model, by what is added to its name; an ensemble has several."""
    if not isinstance(model, LoraEnsemble) or model.members == 1:
        return {"": reading.reward}
    return {
        "" if reduce == model.reduce else reduce: reduce_members(reading.scores, reduce, model.penalty)
        for reduce in REDUCTIONS
    }


def count(data: StudyData, dataset: PairDataset) -> Row:
    """By how much measured properties speak for the chosen answer."""
    data.setup("fit")
    learned: PairDataset = data.require("train_set")  # type: ignore[assignment]
    differences = regress(learned.pairs, dataset.pairs, stack_names(GROUPS))
    return {"differences": {"": line(differences.tolist())}, **about(dataset.pairs, range(len(dataset)))}


def judge(judging: CausalJudge, places: Sequence[int], dataset: PairDataset) -> Row:
    """By how much a judge calls the chosen answer the better one, as the mean over both orders."""
    start = time.perf_counter()
    odds = np.array([judging.both_orders(dataset.pairs[place]) for place in places])
    return {
        "differences": {"": line(odds.mean(axis=1).tolist())},
        # How often it says the same in both orders.
        "consistent": float(PERCENT * np.mean(np.sign(odds[:, 0]) == np.sign(odds[:, 1]))),
        **about(dataset.pairs, places),
        "score_seconds": round(time.perf_counter() - start, 1),
    }


def about(pairs: Sequence[Pair], places: Sequence[int]) -> Row:
    """Which pairs were scored: without their words, which are not ours to give away."""
    chosen = [pairs[place] for place in places]
    names = list(dict.fromkeys(pair.category for pair in chosen))
    return {
        "pairs": len(chosen),
        "places": line(list(places)),
        "prompts": line(number_prompts(pairs)[list(places)].tolist()),
        "categories": names,
        "category": line([names.index(pair.category) for pair in chosen]),
        "longer": line(length_differences(chosen).tolist()),
    }


def line(numbers: Sequence[float]) -> str:
    """Numbers in one line."""
    return " ".join(f"{number:.5g}" if isinstance(number, float) else str(number) for number in numbers)


def numbers(text: str) -> Array:
    """A line of numbers."""
    return np.array(text.split(), dtype=np.float64)


# --- rows ------------------------------------------------------------------------------------------------------------


def result_path(options: argparse.Namespace, one: Run) -> Path:
    """Where the row of a run is."""
    return Path(options.folder) / "results" / f"{options.source}.{one.name}.json"


def describe(options: argparse.Namespace, one: Run) -> Row:
    """What a row is about; one about anything else is not that of the run."""
    found = {name: getattr(options, name) for name in ("source", "base", "limit", "sample")}
    method = METHODS[one.method]
    if one.part == VAL:
        found["validate"] = VALIDATED
    if method.kind == "judge":
        found["judge"] = options.judge
    if method.data.get("held_out"):
        found["gold_limit"] = options.gold_limit
    if method.kind == "properties":
        found |= {"groups": GROUPS, "counted": list(CAPABILITIES)}
    if method.kind in MODELS:
        found |= {"clip": CLIP, "alpha": ALPHA, "prompt_depths": PROMPT_DEPTHS}
    return {**found, **one._asdict(), "setting": setting(method)}


def setting(method: Method) -> Row:
    """A method as plain data, with what it leaves at its default, which may change."""
    row = asdict(method)
    if method.kind in MODELS:
        row["network"] = defaults(MODELS[method.kind]) | row["network"]
        row["data"] = defaults(RewardDataModule) | row["data"]
        row["task"] = defaults(RewardTask) | row["task"]
    return row


def defaults(of: type) -> Row:
    """Arguments of a class that have a default, but for those that the command line or the run decides."""
    decided = ("base", "base_sha256", "source", "root", "limit", "seed", "num_workers", "cache", "epochs")
    parameters = signature(of).parameters.values()
    return {one.name: one.default for one in parameters if one.default is not one.empty and one.name not in decided}


def runs_of(options: argparse.Namespace, methods: Sequence[str]) -> list[Run]:
    """One seed of all methods before the next; what is not drawn at random has one seed."""
    return [
        Run(method, seed, options.part)
        for number, seed in enumerate(options.seeds)
        for method in methods
        if not (number and METHODS[method].kind in ("judge", "properties"))
    ]


def run_missing(options: argparse.Namespace) -> None:
    """Run everything without a row."""
    torch.set_num_threads(options.threads)
    for one in runs_of(options, options.methods):
        path, wanted = result_path(options, one), describe(options, one)
        if is_done(path, wanted):
            continue
        print(f"{options.source}, {one.name}", flush=True)
        start = time.perf_counter()
        row = run(options, one)
        write_whole(path, {**wanted, "seconds": round(time.perf_counter() - start, 1), **row})


def read_rows(options: argparse.Namespace) -> dict[str, list[Row]]:
    """By method the rows of those seeds that have one.

    Raises:
        ValueError: One is about another setting.
    """
    rows: dict[str, list[Row]] = {}
    for one in runs_of(options, list(METHODS)):
        if is_done(result_path(options, one), describe(options, one)):
            rows.setdefault(one.method, []).append(json.loads(result_path(options, one).read_text()))
    # In the order of the methods, not of the seeds.
    return {method: rows[method] for method in METHODS if method in rows}


# --- tables ----------------------------------------------------------------------------------------------------------


def make_report(rows: Mapping[str, Sequence[Row]], places: str | None = None) -> Report | None:
    """All methods on the same pairs, from their rows; None where none is scored on them.

    Args:
        rows: By method, one per seed.
        places: Positions of the pairs; None is all, which leaves out what is scored on a sample alone.

    Raises:
        ValueError: Two rows are about other pairs.
    """
    whole = {method: of for method, of in rows.items() if not METHODS[method].sampled and method != GOLD}
    first = next((of[0] for of in whole.values()), None)
    if first is None:
        return None
    used = whole if places is None else {method: of for method, of in rows.items() if method != GOLD}
    wanted = numbers(first["places"] if places is None else places)
    shown = np.isin(numbers(first["places"]), wanted)
    differences: dict[str, Array] = {}
    for method, of in used.items():
        for name in of[0]["differences"]:
            values = [numbers(row["differences"][name])[np.isin(numbers(row["places"]), wanted)] for row in of]
            differences[f"{method}/{name}" if name else method] = np.stack(values)
    for method, of in whole.items():
        if any(row["longer"] != first["longer"] or row["prompts"] != first["prompts"] for row in of):
            raise ValueError(f"The rows of {method} score other pairs: run it again.")
    categories = [first["categories"][int(place)] for place in numbers(first["category"])[shown]]
    prompts = np.unique(numbers(first["prompts"])[shown], return_inverse=True)[1]
    lengths = numbers(first["longer"])[shown]
    return Report.of(categories, prompts, lengths, {**differences, LONGER: lengths}, goals_of(categories))


def table(rows: Mapping[str, Sequence[Row]], report: Report) -> list[Row]:
    """One line per method: means over seeds with their deviation, sizes, times, and the router's accuracy."""
    lines = []
    for name in report.scores:
        of = rows.get(name, [])
        entry: Row = {"method": name, "what": METHODS[name].what if of else "", "seeds": len(report.scores[name])}
        for key in report.metric_names():
            values = report.values(name, key)
            entry |= {key: float(values.mean()), f"{key} std": float(values.std(ddof=1)) if len(values) > 1 else 0.0}
        for key in ("parameters_trained", "train_seconds", "score_seconds", "consistent"):
            if of and key in of[0]:
                entry[key] = float(np.mean([row[key] for row in of]))
        if of and "routes" in of[0]:
            entry["router_acc"] = float(np.mean([router_accuracy(row) for row in of]))
        lines.append(entry)
    return lines


def confusion(row: Row) -> NDArray[np.int64]:
    """Where the prompts of each group were sent, each prompt once."""
    first = np.unique(numbers(row["prompts"]), return_index=True)[1]
    wanted, found = (numbers(row[name])[first].astype(int) for name in ("wanted", "routes"))
    known = wanted >= 0
    return confusion_matrix(wanted[known].tolist(), found[known].tolist(), len(row["groups"]))


def router_accuracy(row: Row) -> float:
    """Share of prompts that were sent to their own group, in percent."""
    matrix = confusion(row)
    return float(PERCENT * np.trace(matrix) / matrix.sum())


def routes_by_category(row: Row) -> dict[str, list[int]]:
    """How many prompts of each category were sent to each inner model, each prompt once."""
    first = np.unique(numbers(row["prompts"]), return_index=True)[1]
    categories, found = (numbers(row[name])[first].astype(int) for name in ("category", "routes"))
    counts = np.zeros((len(row["categories"]), len(row["groups"])), dtype=int)
    np.add.at(counts, (categories, found), 1)
    return dict(zip(row["categories"], counts.tolist(), strict=True))


def differences(rows: Mapping[str, Sequence[Row]], report: Report) -> list[Row]:
    """How much a method is above another on the seeds that both have, with 95 % intervals over prompts and seeds."""
    found = []
    for first, second in PAIRS:
        if {first, second} <= report.scores.keys():
            scores = on_same_seeds(rows, report, (first, second))
            if seeds := len(scores[first]):
                lines = replace(report, scores=scores).difference_rows(first, second, report.metric_names())
                found += [{"compared": f"{first} - {second}", "seeds": seeds, **line} for line in lines]
    return found


def on_same_seeds(rows: Mapping[str, Sequence[Row]], report: Report, names: Sequence[str]) -> dict[str, Array]:
    """The scores `(seeds, n)` of some methods on the seeds that all of them have that are drawn at random.

    Args:
        rows: By method, one per seed.
        report: Has their scores.
        names: Theirs.
    """
    seeds = {name: [row["seed"] for row in rows.get(name.partition("/")[0], [])] for name in names}
    drawn = {name: of for name, of in seeds.items() if of and METHODS[name.partition("/")[0]].kind in MODELS}
    shared = set.intersection(*map(set, drawn.values())) if drawn else set()
    return {
        name: report.scores[name][[seed in shared for seed in drawn[name]]] if name in drawn else report.scores[name]
        for name in names
    }


def write_tables(options: argparse.Namespace) -> None:
    """Print and write the tables, and draw the figure; a part other than the test has a file of its own."""
    rows = read_rows(options)
    report = make_report(rows)
    if report is None:
        raise DataNotFoundError("results", [options.folder / "results"], "Run the study without --only table.")
    results: dict[str, Any] = {"part": options.part, "all": table(rows, report)}
    results["differences"] = differences(rows, report)
    keys = report.main_names()
    print_table(f"{options.source}, {options.part}: percent", results["all"], ["method", "seeds", *keys, "router_acc"])
    print_table("Differences", [row for row in results["differences"] if row["metric"] in keys])
    sampled = next((of[0]["places"] for method, of in rows.items() if METHODS[method].sampled), None)
    if sampled is not None and (small := make_report(rows, sampled)) is not None:
        results |= {SAMPLE: table(rows, small), f"{SAMPLE} differences": differences(rows, small)}
        print_table(
            f"The same on {rows_of(small)} pairs", results[SAMPLE], ["method", *small.main_names(), "consistent"]
        )
    routed = {method: of[0] for method, of in rows.items() if "routes" in of[0]}
    results["experts"] = {method: of[0]["experts"] for method, of in rows.items() if "experts" in of[0]}
    # Of all methods they would be more than anybody reads.
    for method, groups in list(results["experts"].items())[:1]:
        print_table(
            f"Experts of {method}, seed {rows[method][0]['seed']}: right about their own capability, percent",
            [
                {"inner model": group, "experts": ", ".join(f"{n} {v:.0f}" for n, v in of.items())}
                for group, of in groups.items()
            ],
        )
    results["routes"] = {
        method: {"groups": row["groups"], "prompts": routes_by_category(row)} for method, row in routed.items()
    }
    for method, of in list(results["routes"].items())[:1]:
        print_table(
            f"Prompts that the router of {method}, seed {rows[method][0]['seed']}, sent to each inner model",
            [{"category": name, **dict(zip(of["groups"], n, strict=True))} for name, n in of["prompts"].items()],
        )
    one = Run("single", 0, options.part)
    preferring = {
        method: np.stack([numbers(row["differences"][""]) for row in of])
        for method, of in rows.items()
        if not METHODS[method].sampled and method != GOLD
    }
    results["refusals"] = refusals(preferring, scored(options, one, make_data(options, one)).pairs)
    print_table("Helpful pairs one of which refuses: that one is preferred", results["refusals"])
    if GOLD in rows:
        results[GOLD] = gold_report(options, rows[GOLD])
    stem = "results" if options.part == TEST else options.part
    write_whole(options.folder / f"{stem}.json", results)
    if options.part == TEST:
        shown = [name for name in SHOWN if name in report.scores]
        print(plot_consistency(report, options.folder / "consistency.png", shown))


def gold_report(options: argparse.Namespace, rows: Sequence[Row]) -> Row:
    """Print how far the gold reward, the mean of runs that are told the goal, agrees with people on training pairs."""
    differences = np.mean([numbers(row["differences"][ORACLE]) for row in rows], axis=0)
    agreement = float(PERCENT * np.mean((differences > 0) + 0.5 * (differences == 0)))
    pairs = limit_pairs(make_data(options, Run(GOLD, 0)).read_training()["val"], options.gold_limit)
    found = {"agreement": agreement, "refusals": refusals({GOLD: differences[None]}, pairs)}
    print(f"The gold reward agrees with people on {agreement:.1f} % of {len(pairs)} training pairs.")
    print_table("Of these, helpful pairs one of which refuses: that one is preferred", found["refusals"])
    return found


def refusals(differences: Mapping[str, Array], pairs: Sequence[Pair]) -> list[Row]:
    """How often models, and people, prefer the answer that refuses, of helpful pairs of which one refuses more.

    Args:
        differences: By model, `(seeds, n)` by how much the chosen answer's reward is higher.
        pairs: n.
    """
    helpful = np.array([pair.category not in HARMLESS for pair in pairs])
    refusing = capability_preferences(pairs, [REFUSAL])[:, 0] * helpful
    places = np.flatnonzero(refusing)
    if not len(places):
        return []
    preferred = {PEOPLE: refusing[places] > 0}
    preferred |= {model: of[:, places] * refusing[places] > 0 for model, of in differences.items()}
    return [
        {"model": name, "pairs": len(places), "percent": float(PERCENT * of.mean())} for name, of in preferred.items()
    ]


def rows_of(report: Report) -> int:
    """How many pairs a report is about."""
    return len(report.prompts)


# --- a checkpoint ----------------------------------------------------------------------------------------------------


def release(options: argparse.Namespace) -> Path:
    """One run as a checkpoint in half precision, whose metadata hold the results of the baselines."""
    one = Run(options.release, options.seed)
    folder = find_run(checkpoint(options, one), one.method, one.seed)
    rows = {name: of for name, of in read_rows(options).items() if name in (one.method, *BASELINES)}
    report = make_report(rows)
    rivals = {
        f"{name.replace('/', '-')}/{key}": value
        for name in (report.scores if report else ())
        if name not in (one.method, LONGER)
        for key, value in report.metrics(name).items()  # type: ignore[union-attr]
    }
    results = [result_of("studies.reward.study", options, rivals, rows)]
    card = replace(hub.info(folder).card, results=results, verdict=verdict(report, one.method), **TERMS)
    return save_released(load_network(options, one), folder, options.out, card)


def verdict(report: Report | None, method: str) -> str:
    """Whether a mixture paid: how far it is above the best baseline; nothing where not all of these have been run.

    Args:
        report: Of all that has been run.
        method: What is released.
    """
    rivals = (*BASELINES, *READINGS)
    if report is None or method in BASELINES or not {method, *rivals} <= report.scores.keys():
        return ""
    best = max(rivals, key=lambda name: float(report.values(name, POOLED).mean()))
    found = report.difference(method, best, POOLED)
    what, _, reading = best.partition("/")
    named = METHODS[what].what + (f", read as {reading}" if reading else "")
    paid = "paid" if found.low > 0 else "did not pay"
    return (
        f"Against the best of {len(rivals)} readings of baselines ({named}), over "
        f"{len(report.scores[method])} seeds the difference in consistency is "
        f"{found.mean:+.1f} [{found.low:+.1f}, {found.high:+.1f}]: the mixture {paid}." + router_verdict(report, method)
    )


def router_verdict(report: Report, method: str) -> str:
    """What a route drawn at random would cost; nothing where there is no router."""
    if f"{method}/{RANDOM}" not in report.scores:
        return ""
    found = report.difference(method, f"{method}/{RANDOM}", POOLED)
    what = "is better than" if found.low > 0 else "is worse than" if found.high < 0 else "cannot be told from"
    return f" The router {what} a random one: {found.mean:+.1f} [{found.low:+.1f}, {found.high:+.1f}]."


def load_network(options: argparse.Namespace, one: Run) -> Backbone:
    """The network of a run.

    Raises:
        DataNotFoundError: It has not been run in this folder.
    """
    folder = find_run(checkpoint(options, one), one.method, one.seed)
    return hub.load_as(folder, *MODELS.values())  # type: ignore[type-abstract]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = study_parser(__doc__, FOLDER, METHODS, ["preference", "generated"], SEEDS)
    add_release_options(parser)
    parser.add_argument("--part", choices=[VAL, TEST], default=TEST, help="what is scored")
    parser.add_argument("--base", default=MINILM, help="of the reward models")
    parser.add_argument("--judge", default=SMOLLM2, help="the causal model that judges")
    parser.add_argument("--limit", type=int, help="pairs of each part; all by default")
    parser.add_argument("--sample", type=int, default=400, help="pairs that slow methods are scored on")
    parser.add_argument("--gold-limit", type=int, default=1500, help="pairs that the gold reward is scored on")
    options = read_options(parser, arguments, METHODS)
    options.methods = options.methods or list(MAIN if options.part == TEST else chain(*TRIALS.values()))
    options.cache = options.folder / "runs" / "cache"
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing and write the results, or write a checkpoint."""
    options = parse(arguments)
    if options.release:
        print(release(options))
        return
    if not options.only:
        run_missing(options)
    write_tables(options)


if __name__ == "__main__":
    main()
