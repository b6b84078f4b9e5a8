"""The harness of studies/multitask on generated tasks: rates, rows once, tables, paired differences, a checkpoint."""

import json
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

import zoo
from studies.multitask import methods, study
from studies.multitask.methods import MAIN, METHODS, PAIRS, PRIMARY, SHOWN, tuned_as
from studies.multitask.study import Run
from tasks.multitask.data import MultitaskDataModule
from tasks.multitask.examples import Example
from tasks.multitask.model import MultitaskModel
from tasks.multitask.task import MultitaskTask
from tests.tasks.multitask.builders import save_encoder
from zoo import hub
from zoo.errors import DataNotFoundError, UnknownNameError

CHOSEN = ("moe-top1", "smora")
RATES = (1e-3, 3e-3)
HEAD_RATES = (2e-3, 4e-3)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a tiny BERT and its tokenizer."""
    return save_encoder(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def arguments(base, tmp_path_factory):
    """The command line in a folder, that of the results by default."""
    path = tmp_path_factory.mktemp("multitask")

    def compose(*more, folder=path):
        sizes = ["--steps", "4", "--trial-steps", "2", "--batch-size", "8", "--score-limit", "12"]
        options = ["--source", "generated", "--base", base, "--folder", str(folder), *sizes]
        return [*options, "--seeds", "0", "1", "--methods", *CHOSEN, *more]

    return compose


@pytest.fixture(scope="module")
def folder(arguments):
    """Results of two seeds; two rates are tried."""
    options = study.parse(arguments())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "RATES", RATES)
        patch.setattr(study, "HEAD_RATES", HEAD_RATES)
        study.main(arguments("--tune"))
        study.main(arguments())
        words = ("--release", "smora", "--seed", "1", "--commit", "1234567", "--out", str(options.folder / "released"))
        study.main(arguments(*words))
        yield options.folder


def row(folder, name, part="results"):
    return json.loads((folder / part / f"generated.{name}.json").read_text())


def accuracy(folder, method, task, seeds=(0, 1)):
    """By hand."""
    found = [row(folder, f"{method}.seed{seed}")["test"]["tasks"][task] for seed in seeds]
    return 100 * np.mean([np.equal(of["target"].split(), of["predicted"].split()).mean() for of in found])


def average(folder, method, seeds=(0, 1)):
    return np.mean([accuracy(folder, method, task, seeds) for task in ("topic", "mood", "which")])


def test_each_run_and_each_trial_has_one_row(folder):
    names = {path.name.removeprefix("generated.") for path in (folder / "results").iterdir()}
    assert names == {f"{method}.seed{seed}.json" for method in CHOSEN for seed in (0, 1)}
    trials = {path.name.removeprefix("generated.") for path in (folder / "trials").iterdir()}
    tried = {f"{method}.lr{lr:g}.json" for method in CHOSEN for lr in RATES}
    assert trials == tried | {f"heads.lr{lr:g}.json" for lr in HEAD_RATES}
    whole, trial = row(folder, "smora.seed0"), row(folder, "smora.lr0.001", "trials")
    assert (whole["steps"], trial["steps"]) == (4, 2) and "test" not in trial and "val" not in whole
    assert whole["setting"]["adapter"]["top_k"] == 8
    assert len(whole["test"]["task_dependence"]) == 12


def test_half_of_what_is_held_out_chooses_and_the_other_is_tested():
    plain = study.make_data("generated", 8)
    plain.setup("fit")
    plain.setup("test")
    data = study.load_data("generated", 8, 12)
    # All of its tasks decide.
    held_out, tested, validated = (
        {e.id for e in of} for of in (plain.examples["val"], *map(data.examples.get, ("test", "val")))
    )
    assert validated <= held_out and not validated & tested and held_out <= validated | tested
    # By class, and equal texts stay together.
    assert len(validated) == pytest.approx(len(held_out) / 2, rel=0.25)
    assert not {e.id for e in data.examples["train"]} & (validated | tested)
    official = [e.task for e in data.examples["test"] if e.id not in held_out]
    assert {task: official.count(task) for task in official} == dict.fromkeys(("topic", "mood", "which"), 12)


def test_only_the_tasks_that_decide_hold_anything_out(monkeypatch):
    """As on the development data: cola is of GLUE, boolq is not."""
    texts = {"cola": ("right", "wrong"), "boolq": ("yes", "no")}

    def read(part, count):
        return [
            Example(f"{part} {task} {n}", task, f"{part} text {n} of {task}", "", classes[n % 2], "classes", classes)
            for task, classes in texts.items()
            for n in range(count)
        ]

    data = MultitaskDataModule(source="generated", holdout=study.HOLDOUT)
    monkeypatch.setattr(data, "read", lambda part: read(part, 40 if part == "train" else 20))
    monkeypatch.setattr(study, "make_data", lambda *_: data)
    study.load_data.__wrapped__("generated", 8, 6)
    counts = {part: Counter(example.task for example in of) for part, of in data.examples.items()}
    assert counts["train"] == {"cola": 28, "boolq": 40} and counts["val"] == {"cola": 6}
    assert counts["test"] == {"cola": 20 + 6, "boolq": 6}
    whole = [example.id for of in data.examples.values() for example in of]
    assert len(whole) == len(set(whole))


def test_holm_is_of_all_primary_comparisons_or_none(folder, arguments):
    rows = study.read_rows(study.parse(arguments()))
    report, losses = study.make_report(rows, study.TEST), study.Losses(rows)
    assert not any("holm" in line for line in study.differences(report, losses))
    for name in {name for pair in PRIMARY for name in pair}:
        for of in (report.predictions, losses.losses):
            of[name] = of["moe-top1"]
    lines = [line for line in study.differences(report, losses) if "holm" in line]
    assert [line["compared"] for line in lines] == [f"{first} - {second}" for first, second in PRIMARY]
    assert all(line["holm"] == 1 for line in lines)


def test_each_method_has_the_rate_with_the_lowest_loss_in_validation(folder):
    best = {}
    for method, rates in (("heads", HEAD_RATES), *((method, RATES) for method in CHOSEN)):
        found = [row(folder, f"{method}.lr{lr:g}", "trials")["val"]["tasks"].values() for lr in rates]
        best[method] = rates[int(np.argmin([np.mean([task["loss"] for task in of]) for of in found]))]
    for method in CHOSEN:
        found = row(folder, f"{method}.seed1")
        assert (found["lr"], found["head_lr"], found["router_lr"]) == (best[method], best["heads"], 3e-4)
        assert row(folder, f"{method}.lr0.001", "trials")["head_lr"] == best["heads"]


def test_the_loss_of_a_trial_is_that_of_its_validation(folder, arguments):
    options = study.parse(arguments())
    one = Run("smora", 1e-3, study.TRIAL_SEED, True)
    data = study.load_data("generated", options.batch_size, options.score_limit)
    model = zoo.load(study.checkpoint(options, one)).eval()
    data.encode(model.form)
    found = {}
    for place, example in enumerate(data.val_set.examples):
        batch = data.collate(data.val_set, [place])
        with torch.no_grad():
            scores = model(*batch.inputs)[0]
        found.setdefault(example.task, []).append(float(scores.logsumexp(0) - scores[batch.labels[0]]))
    recorded = {task: of["loss"] for task, of in row(folder, one.name, "trials")["val"]["tasks"].items()}
    assert recorded == pytest.approx({task: np.mean(of) for task, of in found.items()}, abs=1e-4)


def test_a_seed_determines_the_network(folder, arguments):
    """Adapters and routers, whatever ran before in the process."""
    options = study.parse(arguments())
    first, again, other = (study.build(options, Run("smora", 1e-3, seed)).model.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items())


def test_settings_of_a_layer_have_the_rate_that_one_of_them_chose(monkeypatch, arguments):
    assert [tuned_as(name) for name in ("smora-k16", "smora-k16-p8", "lora-r8")] == [*["smora-k16-p8"] * 2, "lora-r8"]
    found = [0.7, 0.5, 0.6]
    monkeypatch.setattr(study, "RATES", methods.RATES)
    monkeypatch.setattr("pathlib.Path.is_file", lambda _: True)
    monkeypatch.setattr(
        study, "validated", lambda _, one: found[study.RATES.index(one.lr)] if one.method == "smora-k16-p8" else None
    )
    options = study.parse(arguments())
    for method in ("smora-k16", "smora-k16-p8"):
        assert study.losses_of(options, method) == dict(zip(methods.RATES, found, strict=True))
        assert study.chosen_rate(options, method) == study.RATES[1]


def test_holm():
    """An example by hand: the smallest times 4, the next times 3, ..., never falling, at most 1."""
    assert study.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert study.holm([0.6, 0.9]) == [1, 1] and study.holm([]) == []


def test_active_parameters_are_those_of_the_chosen_ranks(folder):
    """Per linear layer: the chosen ranks of A and B, and the router."""
    shapes = 2 * [(32, 32)] * 4 + 2 * [(32, 64), (64, 32)]
    active = {name: row(folder, f"{name}.seed0")["parameters_active"] for name in CHOSEN}
    assert active["moe-top1"] == sum(8 * (a + b) + 8 * a for a, b in shapes)
    assert active["smora"] == sum(8 * (a + b) + 64 * a for a, b in shapes)


def test_tables(folder):
    found = json.loads((folder / "results.json").read_text())
    lines = {line["method"]: line for line in found["test"]}
    assert list(lines) == [*CHOSEN, "majority"]
    for method in CHOSEN:
        assert lines[method]["average"] == pytest.approx(average(folder, method))
        by_seed = [average(folder, method, [seed]) for seed in (0, 1)]
        assert lines[method]["average std"] == pytest.approx(np.std(by_seed, ddof=1))
        assert lines[method]["topic/accuracy"] == pytest.approx(accuracy(folder, method, "topic"))
    losses = [[of["loss"] for of in row(folder, f"smora.seed{seed}")["test"]["tasks"].values()] for seed in (0, 1)]
    assert lines["smora"]["loss"] == pytest.approx(np.mean(losses))
    explained = [row(folder, f"smora.seed{seed}")["test"]["task_dependence"].values() for seed in (0, 1)]
    assert lines["smora"]["task_dependence"] == pytest.approx(np.mean([value[0] for of in explained for value in of]))
    between = {(line["compared"], line["metric"]): line for line in found["differences"]}
    one = between["smora - moe-top1", "average"]
    assert one["mean"] == pytest.approx(average(folder, "smora") - average(folder, "moe-top1"))
    assert one["low"] <= one["mean"] <= one["high"] and 0 < one["p_value"] <= 1
    one = between["smora - moe-top1", "loss"]
    assert one["mean"] == pytest.approx(lines["smora"]["loss"] - lines["moe-top1"]["loss"], abs=1e-3)
    assert one["low"] <= one["mean"] <= one["high"]
    assert (folder / "scores.png").is_file()


def test_scores_are_those_of_the_task(folder, arguments, monkeypatch):
    options = study.parse(arguments())
    lr = row(folder, "smora.seed0")["lr"]
    data = study.load_data("generated", options.batch_size, options.score_limit)
    task = MultitaskTask(pretrained=str(study.checkpoint(options, Run("smora", lr, 0))))
    # Which would read the test part alone.
    monkeypatch.setattr(data, "setup", lambda stage: None)
    trainer = pl.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu", default_root_dir=folder)
    trainer.test(task, data, verbose=False)
    tasks, predictions = task.judged(data.test_set, task.kept)
    stored = row(folder, "smora.seed0")["test"]["tasks"]
    assert {of.name: study.digits(of.targets) for of in tasks} == {name: of["target"] for name, of in stored.items()}
    agreed = [
        np.equal(stored[name]["predicted"].split(), study.digits(of).split()).mean() for name, of in predictions.items()
    ]
    assert np.mean(agreed) == 1


def test_all_methods_learn_from_the_same_examples_in_the_same_order(arguments):
    data = study.load_data("generated", 8, 12)
    data.seed, data.epoch_size = 1, 32
    first, second = ([batch.places for batch in data.train_dataloader()] for _ in range(2))
    assert first == second
    data.seed = 0
    assert [batch.places for batch in data.train_dataloader()] != first


def test_a_second_call_runs_nothing(folder, arguments, monkeypatch):
    monkeypatch.setattr(study, "run", None)
    study.main(arguments())
    study.main(arguments("--tune"))


def test_a_row_of_another_setting_is_refused(arguments, folder, monkeypatch):
    with pytest.raises(ValueError, match="steps=4"):
        study.main(arguments("--steps", "5"))
    monkeypatch.setitem(METHODS, "smora", replace(METHODS["smora"], adapter={"r": 8, "top_k": 4}))
    with pytest.raises(ValueError, match="has setting="):
        study.main(arguments("--only", "table"))


def test_what_is_missing_is_said(arguments, folder, tmp_path):
    with pytest.raises(DataNotFoundError, match="--tune --methods moe-top1"):
        study.main(arguments(folder=tmp_path))
    with pytest.raises(DataNotFoundError, match="without --only table"):
        study.main(arguments("--only", "table", folder=tmp_path))
    with pytest.raises(UnknownNameError, match="'smora'"):
        study.main(["--methods", "smore"])
    for words in (["--source", "generated"], ["--release", "smora", "--seed", "0"], ["--out", str(tmp_path)]):
        with pytest.raises(SystemExit):
            study.main(words)


def test_the_release_holds_adapters_and_heads_and_what_others_scored(folder):
    hub.verify(folder / "released")
    model = zoo.load(folder / "released")
    whole = zoo.load(folder / "runs/generated.smora.seed1/checkpoint")
    for name, value in model.named_parameters():
        assert torch.equal(value, whole.get_parameter(name).half().float()) or not value.requires_grad, name
    assert all(".smora_experts." in name or name.startswith("heads.") for name in model.state_dict())
    rivals = {of["method"]: of for of in hub.recorded(folder / "released", ["average"])}
    assert set(rivals) == {"moe-top1 (recorded)", "smora (recorded)"}
    assert rivals["moe-top1 (recorded)"]["average"] == pytest.approx(average(folder, "moe-top1"))
    assert rivals["moe-top1 (recorded)"]["command"] == (
        f"python -m studies.multitask.study --seeds 0 1 --methods {' '.join(CHOSEN)}"
    )


def test_a_card_names_the_seeds_that_each_method_has(folder, arguments, tmp_path, monkeypatch):
    options = ["--release", "smora", "--seed", "1", "--commit", "c0ffee", "--out", str(tmp_path / "released")]
    read_rows = study.read_rows

    def found(of):
        return read_rows(of).items()

    kept = {"moe-top1": 1}
    monkeypatch.setattr(study, "read_rows", lambda of: {name: rows[: kept.get(name)] for name, rows in found(of)})
    study.main(arguments(*options, folder=folder))
    results = hub.info(tmp_path / "released").card.results
    assert {of.command.partition(" --seeds ")[2] for of in results} == {
        "0 --methods moe-top1",
        f"0 1 --methods {' '.join(name for name in CHOSEN if name != 'moe-top1')}",
    }
    assert all(name.startswith("moe-top1/") == ("moe-top1" in of.command) for of in results for name in of.metrics)


def test_what_is_released_learns_longer_than_its_table(arguments):
    options = study.parse(arguments())
    for name in ("smora", "mola-even", "lora-r64"):
        short, long, slow = (METHODS[f"{name}{end}"] for end in ("", "-long", "-slow"))
        assert replace(slow, what="", rate_share=1) == replace(long, what="") and slow.rate_share == 0.3
        assert replace(long, what="", rate_of="", times=1) == replace(short, what="")
        dropped = METHODS[f"{name}-dropout"]
        key = "lora_dropout" if name == "lora-r64" else "dropout"
        assert dropped.adapter == {**short.adapter, key: 0.1}
        assert replace(dropped, what="", adapter={}) == replace(slow, what="", adapter={})
        assert study.steps_of(options, Run(f"{name}-long", 1e-3, 0)) == 3 * study.steps_of(options, Run(name, 1e-3, 0))
        assert study.steps_of(options, Run(f"{name}-long", 1e-3, 0, trial=True)) == options.trial_steps


def test_longer_runs_are_validated_and_may_be_slower(arguments, folder, tmp_path):
    for part in ("trials", "results"):
        shutil.copytree(folder / part, tmp_path / part)
    study.main([*arguments(folder=tmp_path), "--methods", "smora-slow", "--seeds", "0"])
    found, short = row(tmp_path, "smora-slow.seed0"), row(tmp_path, "smora.seed0")
    assert (found["steps"], found["lr"]) == (3 * short["steps"], round(0.3 * short["lr"], 8))
    assert found["head_lr"] == short["head_lr"]
    assert found["val"]["tasks"].keys() == found["test"]["tasks"].keys()
    assert found["val"] != found["test"]
    lines = {of["method"]: of for of in json.loads((tmp_path / "results.json").read_text())["test"]}
    assert (
        lines["smora-slow"]["val_loss"] == pytest.approx(study.mean_loss(found["val"])) != lines["smora-slow"]["loss"]
    )
    assert "val_loss" not in lines["smora"]


@pytest.mark.parametrize(("alike", "said"), [(True, "did not pay"), (False, "paid")])
def test_a_verdict_is_about_plain_lora(folder, arguments, monkeypatch, alike, said):
    report = study.make_report(study.read_rows(study.parse(arguments())), study.TEST)
    assert study.verdict(report, "smora") == "", "it has not been run"
    right = {name: np.tile(task.targets, (2, 1)) for name, task in report.tasks.items()}
    wrong = {name: np.full_like(of, -1) for name, of in right.items()}
    report.predictions["smora"], report.predictions["lora-r64"] = right, right if alike else wrong
    assert study.verdict(report, "smora").endswith(f"the mixture {said}.")
    assert study.verdict(report, "smora-long") == "", "what learned as long has not been run"
    report.predictions["smora-long"], report.predictions["lora-r64-long"] = right, right if alike else wrong
    found = study.verdict(report, "smora-long")
    assert METHODS["lora-r64-long"].what in found and found.endswith(f"the mixture {said}.")
    # The best of LoRA's longer runs counts, whatever it differs in.
    report.predictions["lora-r64-slow"] = right
    found = study.verdict(report, "smora-long")
    assert found.endswith("the mixture did not pay.") and (METHODS["lora-r64-slow"].what in found) != alike


# Ranks by which alpha is divided, where they are not 8; of a single gate a quarter as many.
ACTIVE = {
    "lora-r64": 64,
    "lora-r64-long": 64,
    "lora-r64-slow": 64,
    "lora-r64-dropout": 64,
    "moe-top1": 2,
    "smora-k16": 16,
    "smora-k16-p8": 16,
    "smora-k4": 4,
    "smora-k32": 32,
}


def scales_of(model):
    """Of all adapters in a network."""
    scales = [of.scaling for of in model.modules() if hasattr(of, "lora_B")]
    return {value for of in scales for value in (of.values() if isinstance(of, dict) else [of])}


def test_methods_fit_each_other_and_the_network(base, monkeypatch):
    assert set(MAIN) | set(SHOWN) | {name for pair in PAIRS for name in pair} == METHODS.keys()
    assert {tuned_as(tuned_as(name)) for name in METHODS} == {tuned_as(name) for name in METHODS}
    assert {name for pair in PRIMARY for name in pair} <= set(MAIN)
    for name in (name for name in METHODS if name.startswith("mola")):
        experts = METHODS[name].adapter["experts"]
        assert (len(experts), sum(experts)) == (6, 30), name
    for name, method in METHODS.items():
        adapter = dict(method.adapter)
        if isinstance(adapter.get("experts"), list):
            # The tiny encoder has two layers.
            adapter["experts"] = adapter["experts"][:2]
        if method.method != "none":
            adapter["target_modules"] = ["query"]
        model = MultitaskModel(base=base, method=method.method, adapter=adapter or None)
        assert scales_of(model) == (set() if name == "heads" else {16 / ACTIVE.get(name, 8)}), name
