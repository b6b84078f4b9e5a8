"""The harness of studies/qa on generated questions: rows once, two stages, folds, paired differences, a checkpoint."""

import json
from dataclasses import replace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

import zoo
from studies.qa import study
from studies.qa.methods import MAIN, METHODS, PAIRS, REPLAY, SHOWN
from studies.qa.study import Run
from tasks.qa.data import QADataModule
from tasks.qa.evaluate import score_answers
from tasks.qa.task import OURS, QATask
from tests.tasks.qa.builders import save_base
from zoo import hub
from zoo.errors import DataNotFoundError, UnknownNameError

FIRST = ("dense", "moe")
SECOND = ("moe-ood-eda", "moe-ood-eda-keep", "late-moe-ood-eda-keep", "moe-ood-eda-frozen")
CHOSEN = (*FIRST, *SECOND)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a tiny BERT and its tokenizer."""
    return save_base(tmp_path_factory.mktemp("base"), 32, 256)


@pytest.fixture(scope="module")
def arguments(base, tmp_path_factory):
    """The command line in a folder, that of the results by default."""
    path = tmp_path_factory.mktemp("qa")

    def compose(*more, folder=path):
        options = ["--source", "generated", "--base", base, "--limit", "24", "--score-limit", "20"]
        return [*options, "--folder", str(folder), "--seeds", "0", "1", "--methods", *CHOSEN, *more]

    return compose


@pytest.fixture(scope="module")
def folder(arguments):
    """Results of two seeds."""
    study.main(arguments())
    study.main(arguments("--fold", "0", "1", "--methods", "moe", "moe-ood-eda", "--seeds", "0"))
    options = study.parse(arguments())
    study.main(
        arguments(
            "--release", "moe-ood-eda", "--seed", "1", "--commit", "c0ffee", "--out", str(options.folder / "released")
        )
    )
    return options.folder


def row(folder, name):
    return json.loads((folder / "results" / f"generated.{name}.json").read_text())


def numbers(row, part, measure):
    """By domain."""
    return {domain: np.array(columns[measure].split(), dtype=float) for domain, columns in row[part].items()}


def macro(folder, method, key, seeds=(0, 1)):
    """By hand: the mean over domains of the mean over questions, and over seeds."""
    measure, kind = key.split("_")
    means = []
    for seed in seeds:
        scores = numbers(row(folder, f"{method}.seed{seed}"), "test", measure)
        ood = kind == "ood"
        means.append(
            np.mean([v.mean() for name, v in scores.items() if (name in study.OOD_DOMAINS["generated"]) == ood])
        )
    return np.mean(means)


def test_each_run_has_one_row(folder):
    names = {path.name.removeprefix("generated.") for path in (folder / "results").iterdir()}
    whole = {f"{method}.seed{seed}.json" for method in CHOSEN for seed in (0, 1)}
    folds = {f"{method}.fold{fold}.seed0.json" for method in ("moe", "moe-ood-eda") for fold in (0, 1)}
    assert names == whole | folds
    first, second = row(folder, "moe.seed0"), row(folder, "moe-ood-eda.seed0")
    assert {"val", "test"} <= first.keys() and "val" not in second
    assert second["setting"]["start"]["moe"]["network"]["num_experts"] == 4
    assert first["parameters"] > row(folder, "dense.seed0")["parameters"] and first["steps"] > 0
    frozen = row(folder, "moe-ood-eda-frozen.seed0")
    assert second["parameters_trained"] - frozen["parameters_trained"] > 0
    assert second["steps"] == frozen["steps"] and second["tokens"] == frozen["tokens"]


def test_a_fold_holds_questions_out_and_sees_no_test(folder, arguments):
    rows = [row(folder, f"moe-ood-eda.fold{fold}.seed0") for fold in (0, 1)]
    assert all("test" not in one and set(one["val"]) == set(study.OOD_DOMAINS["generated"]) for one in rows)
    assert all(one["tokens"] < row(folder, "moe-ood-eda.seed0")["tokens"] for one in rows)
    # The first stage is scored by the reader that is there.
    options = study.parse(arguments())
    model = zoo.load(study.reader_folder(options, Run("moe", 0)))
    together = []
    for fold in (0, 1):
        data = QADataModule(source="generated", base=options.base, limit=options.limit, fold=fold)
        data.setup("validate")
        examples = data.val_set.examples
        scores = score_answers(examples, study.answer(model, data, data.val_set))
        found = row(folder, f"moe.fold{fold}.seed0")
        assert "steps" not in found
        for name, f1 in numbers(found, "val", "f1").items():
            own = scores.f1[[example.domain == name for example in examples]]
            np.testing.assert_allclose(f1, own, atol=1e-3)
            together += [(name, value) for value in own]
    line = json.loads((folder / "folds.json").read_text())["val"][0]
    means = [np.mean([value for name, value in together if name == domain]) for domain in dict(together)]
    assert line["method"] == "moe" and line["f1_ood"] == pytest.approx(np.mean(means), abs=1e-3)


def test_scores_are_those_of_the_task(folder, arguments):
    options = study.parse(arguments())
    data = study.load_scored("generated", options.base, options.score_limit)
    task = QATask(pretrained=str(study.reader_folder(options, Run("moe-ood-eda", 0))))
    pl.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu", default_root_dir=folder).test(
        task, data, verbose=False
    )
    answers = task.answer(data.test_set, task.logits[OURS])
    scores = score_answers(data.test_set.examples, [best[0].text for best in answers.values()])
    domains = np.array([example.domain for example in data.test_set.examples])
    for measure, values in scores._asdict().items():
        for name, found in numbers(row(folder, "moe-ood-eda.seed0"), "test", measure).items():
            np.testing.assert_allclose(found, values[domains == name], atol=1e-3)
    documents = numbers(row(folder, "moe-ood-eda.seed0"), "test", "document")
    for name, found in documents.items():
        own = [example.document for example in data.test_set.examples if example.domain == name]
        same = [[one == other for other in own] for one in own]
        assert np.array_equal(found[:, None] == found, same)


def test_tables(folder):
    study_table = json.loads((folder / "results.json").read_text())
    assert [line["method"] for line in study_table["test"]] == list(CHOSEN)
    assert [line["method"] for line in study_table["val"]] == list(FIRST)
    for line in study_table["test"]:
        for key in ("f1_in", "f1_ood", "em_ood"):
            assert line[key] == pytest.approx(macro(folder, line["method"], key), abs=1e-3)
    by_seed = [macro(folder, "moe", "f1_in", [seed]) for seed in (0, 1)]
    assert study_table["test"][1]["f1_in std"] == pytest.approx(np.std(by_seed, ddof=1), abs=1e-3)
    found = {(line["compared"], line["metric"]): line for line in study_table["test differences"]}
    for first, second in (("moe-ood-eda-keep", "dense"), ("moe", "dense"), ("moe-ood-eda-frozen", "moe-ood-eda")):
        between = found[f"{first} - {second}", "f1_ood"]
        ours, theirs = macro(folder, first, "f1_ood"), macro(folder, second, "f1_ood")
        assert between["mean"] == pytest.approx(ours - theirs, abs=1e-3)
        assert between["gain %"] == pytest.approx(100 * (ours - theirs) / theirs, abs=1e-2)
        assert between["low"] <= between["mean"] <= between["high"]
    assert (folder / "f1.png").is_file()


def test_a_plain_reader_becomes_a_mixture_in_the_second_stage(folder, arguments):
    late, plain = row(folder, "late-moe-ood-eda-keep.seed0"), row(folder, "dense.seed0")
    assert late["parameters"] == row(folder, "moe.seed0")["parameters"] > plain["parameters"]
    assert list(late["setting"]["start"]) == ["dense"] and late["setting"]["network"]["num_experts"] == 4


def test_frozen_experts_stay_as_the_first_stage_left_them(folder, arguments):
    options = study.parse(arguments())
    states = [
        zoo.load(study.reader_folder(options, Run(name, 1))).state_dict()
        for name in ("moe", "moe-ood-eda-frozen", "moe-ood-eda")
    ]
    experts = [name for name in states[0] if ".experts.experts." in name]
    moved = [any(not torch.equal(states[0][name], state[name]) for name in experts) for state in states[1:]]
    assert experts and moved == [False, True]


def test_a_second_call_runs_nothing(folder, arguments, monkeypatch):
    monkeypatch.setattr(study, "run", None)
    study.main(arguments())
    study.main(arguments("--only", "table", "--seeds", "0"))
    assert {line["seeds"] for line in json.loads((folder / "results.json").read_text())["test"]} == {1}
    study.main(arguments("--only", "table"))


def test_a_row_of_another_setting_is_refused(folder, arguments, monkeypatch):
    with pytest.raises(ValueError, match="score_limit=20"):
        study.main(arguments("--score-limit", "21"))
    monkeypatch.setitem(METHODS, "moe", replace(METHODS["moe"], task={"lr": 1e-3}))
    # A second stage depends on the first.
    with pytest.raises(ValueError, match="has setting="):
        study.main(arguments("--methods", "moe-ood-eda", "--seeds", "0"))


def test_five_seeds_of_a_second_stage_share_three_readers(arguments, folder):
    options = study.parse(arguments())
    assert study.find_reader(options, Run("moe-ood", 4)) == study.reader_folder(options, Run("moe", 1))
    assert [study.runs_of(options, name, 3) for name in ("moe", "moe-ood")] == [[], [Run("moe-ood", 3)]]


def test_a_second_stage_needs_the_first(arguments, tmp_path):
    with pytest.raises(DataNotFoundError, match="--methods moe --seeds 1"):
        study.main(arguments("--methods", "moe-ood-eda", "--seeds", "1", folder=tmp_path))


def test_the_released_reader_answers_as_the_run_does(folder, arguments):
    hub.verify(folder / "released")
    released = zoo.load(folder / "released")
    options = study.parse(arguments())
    whole = study.reader_folder(options, Run("moe-ood-eda", 1))
    model = zoo.load(whole)
    for name, value in model.named_parameters():
        assert torch.equal(released.get_parameter(name), value.half().float()) or not value.requires_grad, name
    data = study.load_scored("generated", options.base, options.score_limit)
    ours, theirs = (study.answer(reader, data, data.test_set) for reader in (model, released))
    # Rounding may decide between two spans that are as likely.
    assert np.mean([one == other for one, other in zip(ours, theirs, strict=True)]) > 0.95
    assert (folder / "released/model.safetensors").stat().st_size < 0.6 * (whole / "model.safetensors").stat().st_size
    card = hub.info(folder / "released").card
    assert "First stage" in card.data and "augmented ones" in card.data and "folds" in card.data
    (recorded,) = card.results
    assert recorded.command == "python -m studies.qa.study --seeds 0 1"
    assert recorded.commit == "c0ffee" and recorded.metrics["dense/f1_ood"] == pytest.approx(
        macro(folder, "dense", "f1_ood"), abs=1e-3
    )


@pytest.mark.parametrize(("gain", "said"), [(0, "did not pay"), (20, "paid")])
def test_a_verdict_is_about_the_twin(folder, arguments, gain, said):
    report = study.make_report(study.parse(arguments()), study.TEST)
    assert study.verdict(report, "moe") == "", "its twin has not been run"
    report.scores["twin-moe"] = {name: values - gain for name, values in report.scores["moe"].items()}
    found = study.verdict(report, "moe")
    # Seeds are drawn for each of both, so that even equal ones have an interval.
    assert f"{gain:+.1f} [" in found and "over 2 seeds" in found and found.endswith(f"the mixture {said}.")


def test_methods_fit_each_other():
    assert set(MAIN) | set(SHOWN) | {name for pair in PAIRS for name in pair} <= METHODS.keys()
    for name, method in METHODS.items():
        assert method.start is None or bool(method.network) == name.startswith("late-"), name
        assert method.start or method.network, name
        assert method.start is None or METHODS[method.start].start is None, name
    eda, plain = METHODS["moe-ood-eda"], METHODS["moe-ood"]
    assert eda.epochs * (1 + eda.data["augment"]["copies"]) == plain.epochs
    for kept, other in (("moe-ood-eda-keep", eda), ("moe-ood-keep", plain)):
        assert METHODS[kept].data["replay"] * METHODS[kept].epochs == REPLAY and METHODS[kept].epochs == other.epochs


def test_bad_words(tmp_path):
    with pytest.raises(UnknownNameError, match="'moe-top2'"):
        study.main(["--methods", "moe-top"])
    for words in (["--source", "generated"], ["--release", "moe", "--seed", "0"], ["--out", str(tmp_path)]):
        with pytest.raises(SystemExit):
            study.main(words)
