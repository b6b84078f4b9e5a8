"""Readers with experts beside plain ones, learned in domain and then on few out-of-domain questions, over seeds.

    python -m studies.qa.study                         run what is missing, then write the table and the figure
    python -m studies.qa.study --methods dense adapters --seeds 0 1
    python -m studies.qa.study --only table            only write them
    python -m studies.qa.study --methods dense-ood-eda-keep --seeds 0 --fold 0 2        choose a second stage's settings
    python -m studies.qa.study --release adapters-ood-eda-keep --seed 0 --commit COMMIT --out FOLDER

Every (method, seed) is one JSON file in `results/`; what has one is not run again. A second stage of seed s goes on
from the first stage of seed s modulo 3, whose reader is in `runs/`. `--release` makes a
checkpoint of the reader of one run.
"""

import argparse
import json
import resource
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch

from studies.options import add_release_options, read_options, study_parser
from studies.qa.methods import MAIN, METHODS, PAIRS, SHOWN
from studies.release import find_run, result_of, save_released
from studies.rows import Row, is_done, write_whole
from tasks.qa.data import OOD_DOMAINS, QADataModule, WindowDataset
from tasks.qa.decode import decode
from tasks.qa.evaluate import PERCENT, Report, Scores, score_answers
from tasks.qa.examples import Example
from tasks.qa.model import QAReader
from tasks.qa.plots import plot_scores
from tasks.qa.task import Logits, QATask
from zoo import hub
from zoo.base_models import MINILM
from zoo.callbacks import EpochSeed
from zoo.errors import DataNotFoundError
from zoo.report import print_table

FOLDER = Path(__file__).parent
SEEDS = (0, 1, 2, 3, 4)
# Seeds of a first stage.
FIRST_SEEDS = 3
# What is scored: documents held out, in domain or a fold out of domain; and the questions that nothing is chosen by.
VAL, TEST = "val", "test"
# What a released reader says of what it was made with.
TERMS = {
    "robustqa": {
        "data_terms": "mixed: CC-BY-SA-4.0 (SQuAD, Natural Questions), MIT, Apache-2.0, some state none",
        "weights_licence": "Apache-2.0",
    },
    "generated": {"data_terms": "none: synthetic", "weights_licence": "Apache-2.0"},
}
# Of a second stage, whose own data module knows nothing of it.
CHOSEN_BY_FOLDS = "Its settings were chosen on folds of the out-of-domain questions, too."
MACRO = tuple(f"{measure}_{kind}" for kind in ("in", "ood", "ood_pooled") for measure in ("f1", "em"))


class Run(NamedTuple):
    """A method with its seed; with a fold of the out-of-domain questions, it is scored on that alone."""

    method: str
    seed: int
    fold: int | None = None

    @property
    def name(self) -> str:
        """Of its files."""
        fold = "" if self.fold is None else f".fold{self.fold}"
        return f"{self.method}{fold}.seed{self.seed}"


# --- running ---------------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace, one: Run) -> Row:
    """Train and score."""
    data = make_data(options, one)
    if one.fold is not None and METHODS[one.method].start is None:
        # A first stage has learned nothing out of domain, so the same reader is for every fold.
        data.setup("validate")
        model, facts = hub.load_as(find_reader(options, one), QAReader), {}
    else:
        model, facts = train(options, one, data)
    parts: Row = {}
    if one.fold is not None or METHODS[one.method].start is None:
        parts[VAL] = judge(model, data, data.val_set)
    if one.fold is None:
        scored = load_scored(options.source, options.base, options.score_limit)
        parts[TEST] = judge(model, scored, scored.test_set)
    return {**facts, **parts}


def make_data(options: argparse.Namespace, one: Run) -> QADataModule:
    """What a run learns from and is validated on; copies of questions are drawn by its seed."""
    arguments = dict(METHODS[one.method].data)
    if "augment" in arguments:
        arguments["augment"] = {**arguments["augment"], "seed": one.seed}
    return QADataModule(
        source=options.source, base=options.base, limit=options.limit, fold=one.fold, seed=one.seed, **arguments
    )


@cache
def load_scored(source: str, base: str, limit: int) -> QADataModule:
    """The questions that nothing is chosen by, at most so many per domain and the same for all runs."""
    data = QADataModule(source=source, base=base, limit=limit)
    data.setup("test")
    return data


def train(options: argparse.Namespace, one: Run, data: QADataModule) -> tuple[QAReader, Row]:
    """Train a new reader, or one of a first stage; the task saves it as a checkpoint in the run's folder."""
    method = METHODS[one.method]
    pl.seed_everything(one.seed, verbose=False)
    network = {"base": options.base, **method.network}
    if method.start is None:
        task = QATask(network, **method.task)
    elif method.network:
        task = QATask(network, upcycle=str(find_reader(options, one)), **method.task)
    else:
        task = QATask(pretrained=str(find_reader(options, one)), **method.task)
    folder = reader_folder(options, one).parent
    # A killed run may leave a reader, which must not be taken for that of this run.
    shutil.rmtree(folder, ignore_errors=True)
    timer = pl.callbacks.Timer()
    trainer = pl.Trainer(
        max_epochs=method.epochs,
        accelerator="cpu",
        gradient_clip_val=1.0,
        callbacks=[EpochSeed(one.seed), timer],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(task, data)
    trained = sum(parameter.numel() for parameter in task.model.parameters() if parameter.requires_grad)
    return task.model.eval(), {
        "train_seconds": round(timer.time_elapsed("train"), 1),
        "steps": trainer.global_step,
        "tokens": method.epochs * sum(data.train_set.lengths),
        "parameters": sum(parameter.numel() for parameter in task.model.parameters()),
        "parameters_trained": trained,
        # Of the process until now, the runs before this one included.
        "process_peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def reader_folder(options: argparse.Namespace, one: Run) -> Path:
    """Where the checkpoint of a run is."""
    return options.folder / "runs" / f"{options.source}.{one.name}" / "checkpoint"


def find_reader(options: argparse.Namespace, one: Run) -> Path:
    """The checkpoint of the first stage that a run goes on from, or of that itself.

    Raises:
        DataNotFoundError: It has not been run in this folder.
    """
    first = Run(METHODS[one.method].start or one.method, one.seed % FIRST_SEEDS)
    return find_run(reader_folder(options, first), first.method, first.seed)


@torch.no_grad()
def answer(model: QAReader, data: QADataModule, dataset: WindowDataset) -> list[str]:
    """The best answer to each question."""
    logits = Logits.of(dataset)
    for batch in data.loader(dataset):
        logits.add(dataset, batch, *model(batch.input_ids, batch.attention_mask, batch.type_ids))
    found = decode(dataset.examples, dataset.windows, logits.starts, logits.ends, n_best=1)
    return [best.text for (best,) in found]


def judge(model: QAReader, data: QADataModule, dataset: WindowDataset) -> Row:
    """F1 and EM of each question by domain, with its document, numbered from 0."""
    scores = score_answers(dataset.examples, answer(model, data, dataset))
    numbers: dict[str, int] = {}
    row: Row = {}
    for example, f1, em in zip(dataset.examples, *scores, strict=True):
        number = numbers.setdefault(example.document, len(numbers))
        columns = row.setdefault(example.domain, {"document": [], "f1": [], "em": []})
        for name, value in zip(columns, (number, f1, em), strict=True):
            columns[name].append(f"{value:.6g}")
    # Numbers in one line each.
    return {domain: {name: " ".join(of) for name, of in columns.items()} for domain, columns in row.items()}


# --- rows ------------------------------------------------------------------------------------------------------------


def result_path(options: argparse.Namespace, one: Run) -> Path:
    """Where the row of a run is."""
    return options.folder / "results" / f"{options.source}.{one.name}.json"


def describe(options: argparse.Namespace, one: Run) -> Row:
    """What a row is about; one about anything else is not that of the run."""
    about = {name: getattr(options, name) for name in ("source", "base", "limit", "score_limit")}
    return {**about, **one._asdict(), "setting": setting(one.method)}


def setting(method: str) -> Row:
    """A method and those that it goes on from, as plain data."""
    row = asdict(METHODS[method])
    return {**row, "start": row["start"] and {row["start"]: setting(row["start"])}}


def runs_of(options: argparse.Namespace, method: str, seed: int) -> list[Run]:
    """Those of a seed: one, or one for each fold; a first stage has fewer seeds."""
    if METHODS[method].start is None and seed >= FIRST_SEEDS:
        return []
    return [Run(method, seed, fold) for fold in options.fold or [None]]


def run_missing(options: argparse.Namespace) -> None:
    """Run everything without a row, one seed of all methods before the next."""
    torch.set_num_threads(options.threads)
    wanted = [one for seed in options.seeds for method in options.methods for one in runs_of(options, method, seed)]
    # What others go on from comes first.
    for one in sorted(wanted, key=lambda one: (one.seed, METHODS[one.method].start is not None)):
        path, about = result_path(options, one), describe(options, one)
        if is_done(path, about):
            continue
        print(f"{options.source}, {one.name}", flush=True)
        start = time.perf_counter()
        row = run(options, one)
        write_whole(path, {**about, "seconds": round(time.perf_counter() - start, 1), **row})


def read_rows(options: argparse.Namespace, method: str) -> list[list[Row]]:
    """The rows of each of a method's seeds: one, or one for each fold; seeds of which any is missing are left out.

    Raises:
        ValueError: One is about another setting.
    """
    seeds = [runs_of(options, method, seed) for seed in options.seeds]
    whole = [
        runs
        for runs in seeds
        if runs and all(is_done(result_path(options, one), describe(options, one)) for one in runs)
    ]
    return [[json.loads(result_path(options, one).read_text()) for one in runs] for runs in whole]


# --- tables ----------------------------------------------------------------------------------------------------------


def unpack(rows: Iterable[Row], part: str) -> tuple[list[Example], Scores]:
    """Questions without words, and their scores, of a seed's rows one after another."""
    questions: list[Example] = []
    values: list[tuple[float, float]] = []
    for row in rows:
        for domain, columns in row[part].items():
            documents, f1, em = (columns[name].split() for name in ("document", "f1", "em"))
            questions += [Example("", domain, f"{row['fold']}/{document}", "", "") for document in documents]
            values += zip(map(float, f1), map(float, em), strict=True)
    return questions, Scores(*np.array(values).T)


def make_report(options: argparse.Namespace, part: str) -> Report | None:
    """All methods on the same questions; None where there is none."""
    questions: list[Example] = []
    scores: dict[str, list[Scores]] = {}
    for method in METHODS:
        for rows in read_rows(options, method):
            if part in rows[0]:
                questions, found = unpack(rows, part)
                scores.setdefault(method, []).append(found)
    domains = {question.domain for question in questions}
    ood = [name for name in OOD_DOMAINS[options.source] if name in domains]
    return Report.of(questions, scores, ood) if questions else None


def table(report: Report) -> list[Row]:
    """One line per method: means over seeds with their deviation."""
    lines = []
    for method, scores in report.scores.items():
        seeds = len(scores["f1"])
        line: Row = {"method": method, "seeds": seeds}
        for key in report.metric_names():
            values = report.values(method, key)
            line |= {key: float(values.mean()), f"{key} std": float(values.std(ddof=1)) if seeds > 1 else 0.0}
        lines.append(line)
    return lines


def differences(report: Report) -> list[Row]:
    """How much a method is above another, with 95 % intervals over documents and seeds, and in percent of the other."""
    lines = []
    for first, second in PAIRS:
        if {first, second} <= report.scores.keys():
            for row in report.difference_rows(first, second, [key for key in MACRO if key in report.metric_names()]):
                theirs = float(report.values(second, row["metric"]).mean())
                gain = PERCENT * row["mean"] / theirs if theirs else None
                lines.append({"compared": f"{first} - {second}", **row, "gain %": gain})
    return lines


def write_tables(options: argparse.Namespace) -> None:
    """Print and write the tables, and draw the figure; folds have files of their own."""
    name = "folds" if options.fold else "results"
    reports = {part: make_report(options, part) for part in (VAL, TEST)}
    results: dict[str, list[Row]] = {}
    for part, report in reports.items():
        if report is not None:
            results |= {part: table(report), f"{part} differences": differences(report)}
            shown = ["method", "seeds", *(key for key in MACRO if key in report.metric_names())]
            print_table(f"{options.source}: {part}", results[part], shown)
            print_table(f"{options.source}: {part}, differences", results[f"{part} differences"])
    write_whole(options.folder / f"{name}.json", results)
    judged = reports[TEST]
    if judged is not None and (models := [method for method in SHOWN if method in judged.scores]):
        print(plot_scores(judged, options.folder / "f1.png", models))


# --- a checkpoint ----------------------------------------------------------------------------------------------------


def release(options: argparse.Namespace) -> Path:
    """The reader of one run as a checkpoint in half precision; its card tells of both stages and of all methods."""
    one = Run(options.release, options.seed)
    folder = find_run(reader_folder(options, one), one.method, one.seed)
    report = make_report(options, TEST)
    if report is None:
        raise DataNotFoundError("results", [options.folder / "results"], "Run the study before.")
    card = hub.info(folder).card
    if METHODS[one.method].start:
        first = hub.info(find_reader(options, one)).card
        card = replace(card, data=f"First stage: {first.data} Second stage: {card.data} {CHOSEN_BY_FOLDS}")
    scores = {
        f"{method}/{key}": value
        for method in report.scores
        for key, value in report.metrics(method).items()
        if key in MACRO
    }
    card = replace(
        card,
        verdict=verdict(report, one.method),
        results=[result_of("studies.qa.study", options, scores)],
        **TERMS[options.source],
    )
    return save_released(hub.load_as(folder, QAReader), folder, options.out, card)


def verdict(report: Report, method: str) -> str:
    """Whether a mixture paid: how far it is above its twin; nothing where that has not been run."""
    twin = f"twin-{method}"
    if twin not in report.scores:
        return ""
    found = {key: report.difference(method, twin, key) for key in ("f1_ood", "f1_in")}
    outside, inside = (f"{of.mean:+.1f} [{of.low:+.1f}, {of.high:+.1f}]" for of in found.values())
    paid = "paid" if found["f1_ood"].low > 0 else "did not pay"
    return (
        f"Against its twin, trained alike over {len(report.scores[method]['f1'])} seeds, the difference "
        f"in F1 is {outside} out of domain and {inside} in domain: the mixture {paid}."
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = study_parser(__doc__, FOLDER, METHODS, ["robustqa", "generated"], SEEDS, MAIN)
    add_release_options(parser)
    parser.add_argument(
        "--fold", nargs="+", type=int, help="validate on these out-of-domain folds (0 to 4), test nothing"
    )
    parser.add_argument("--base", default=MINILM, help="the encoder")
    parser.add_argument("--limit", type=int, help="questions of a domain to learn from; all by default")
    parser.add_argument("--score-limit", type=int, default=300, help="test questions of a domain")
    return read_options(parser, arguments, METHODS)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing and write the results."""
    options = parse(arguments)
    if options.release:
        print(release(options))
        return
    if not options.only:
        run_missing(options)
    write_tables(options)


if __name__ == "__main__":
    main()
