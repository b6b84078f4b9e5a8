"""The harness of studies/routers on generated text: every method runs, once, and records all there is."""

import ast
import json
import math

import pytest
import torch

from studies.routers import claims, data, measure, study
from studies.routers.methods import METHODS
from zoo.errors import DataNotFoundError
from zoo.moe import NullExpertRouter, routed_modules

NUMBERS = {
    *measure.ROUTING_KEYS,
    *("objective", "data", "steps", "method", "seed", "threads", "train_loss", "val_loss"),
    *("seconds_per_step", "parameters_active", "parameters_total"),
}


def arguments(folder, *more, steps=2):
    return ["--data", "generated", "--threads", "1", "--folder", str(folder), "--steps", str(steps), *more]


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masked")
    study.main(arguments(folder, "--seeds", "0"))
    return folder


def rows_in(folder):
    return [json.loads(path.read_text()) for path in sorted((folder / "results").iterdir())]


def test_every_method_records_all_keys(masked):
    rows = rows_in(masked)
    assert {row["method"] for row in rows} == set(METHODS)
    for row in rows:
        assert set(row) == NUMBERS
        assert math.isfinite(row["val_loss"]) and math.isfinite(row["train_loss"])
        assert row["parameters_active"] <= row["parameters_total"]
        if row["method"].startswith("dense-") and row["method"] != "dense-to-sparse":
            assert row["specialisation"] is None
        else:
            assert 0 <= row["specialisation"] <= 1 and 0 <= row["entropy"] <= 1 + 1e-6
            assert len(row["active_per_layer"]) == 2 and len(row["active_by_difficulty"]) == 4


def test_sizes_are_comparable(masked):
    rows = {row["method"]: row for row in rows_in(masked)}
    for name in ("top2", "expert-choice", "cosine", "soft"):
        assert rows[name]["active_experts"] == pytest.approx(2)
    assert {rows[name]["active_experts"] for name in ("switch", "hash", "thor", "dense-to-sparse")} == {1.0}
    assert rows["thor-average"]["active_experts"] == 4
    # Routers are a small part of it.
    assert rows["top2"]["parameters_active"] == pytest.approx(rows["dense-active"]["parameters_total"], rel=0.05)
    assert rows["top2"]["parameters_total"] == pytest.approx(rows["dense-total"]["parameters_total"], rel=0.05)
    assert rows["deepseek"]["parameters_active"] == pytest.approx(rows["top2"]["parameters_active"], rel=0.05)


def test_a_second_call_runs_nothing(masked, monkeypatch, capsys):
    monkeypatch.setattr(study, "Trainer", None)
    monkeypatch.setattr(study, "load_corpus", None)
    study.main(arguments(masked, "--seeds", "0"))
    study.main(["--folder", str(masked), "--only", "table"])
    results = json.loads((masked / "results.json").read_text())
    assert [line["method"] for line in results["methods"]] == list(METHODS)
    assert [line["claim"] for line in results["claims"]] == [claim.words for claim in claims.CLAIMS]
    assert (masked / "routers.png").is_file()
    assert "seed 0" not in capsys.readouterr().out


def test_another_budget_is_refused(masked):
    with pytest.raises(ValueError, match="has steps=2, not 3"):
        study.main(arguments(masked, "--seeds", "0", steps=3))


def test_causal_runs_what_may_be_causal(tmp_path):
    study.main(arguments(tmp_path, "--seeds", "0", "--objective", "causal", steps=1))
    causal = {name for name, method in METHODS.items() if not method.masked_only}
    assert {row["method"] for row in rows_in(tmp_path)} == causal
    with pytest.raises(ValueError, match="lets a token see later"):
        study.main(arguments(tmp_path, "--objective", "causal", "--methods", "soft"))


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.masked_only])
def test_no_causal_method_sees_later_tokens(name):
    corpus = corpus_of(16)
    torch.manual_seed(0)
    trainer = study.Trainer(METHODS[name], 0, corpus, study.BUDGETS["generated"], 1, "causal")
    model = trainer.model.eval()
    ids = corpus.val.ids[:2]
    later = ids.clone()
    later[:, -1] = ids[:, -1] % (corpus.vocab_size - 2) + 2
    scored = torch.ones_like(ids, dtype=torch.bool)
    scored[:, -1] = False
    # Random routing must have the same luck twice.
    torch.manual_seed(1)
    first = model(ids, scored)
    torch.manual_seed(1)
    torch.testing.assert_close(model(later, scored), first)


def test_runs_repeat(tmp_path):
    rows = []
    for name in ("a", "b"):
        study.main(arguments(tmp_path / name, "--seeds", "1", "--methods", "noisy"))
        (row,) = rows_in(tmp_path / name)
        rows.append({key: value for key, value in row.items() if key != "seconds_per_step"})
    assert rows[0] == rows[1]


def test_bad_names(tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'switch'"):
        study.main(arguments(tmp_path, "--methods", "swich"))
    with pytest.raises(SystemExit):
        study.main(["--data", "generated"])


def test_missing_data_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("MOE_ZOO_DATA", raising=False)
    with pytest.raises(DataNotFoundError, match="MOE_ZOO_DATA"):
        study.main(["--folder", str(tmp_path), "--methods", "top2", "--threads", "1"])


def corpus_of(length):
    return data.load_corpus("generated", length, 0, 64, cache=None)


def test_splits_are_disjoint():
    parts = data.hold_out(data.generated_documents())
    keys = {name: {document.key for document in part} for name, part in parts.items()}
    texts = {name: {document.text for document in part} for name, part in parts.items()}
    assert not keys["train"] & keys["val"] and not texts["train"] & texts["val"]
    assert {document.domain for document in parts["val"]} == {"domain-0", "domain-1", "domain-2"}
    corpus = corpus_of(16)
    assert corpus.train.keys and not corpus.train.keys & corpus.val.keys


def test_texts_of_one_document_stay_together():
    documents = [data.Document(str(number // 10), "one", f"text {number}") for number in range(200)]
    parts = data.hold_out(documents, share=0.3)
    assert len(parts["val"]) == 60
    same = [data.Document(str(number), "one", "the same") for number in range(20)]
    with pytest.raises(ValueError, match="share 1 samples"):
        data.hold_out(same)


def test_contexts_that_begin_alike_are_one(tmp_path, monkeypatch):
    pandas = pytest.importorskip("pandas")
    long = "word " * 40
    rows = [("squad", "A", long + "a"), ("squad", "A", long + "b"), ("reviews", "", "short"), ("squad", "B", "other")]
    (tmp_path / "qa").mkdir()
    pandas.DataFrame(rows, columns=["domain", "title", "context"]).to_parquet(tmp_path / "qa" / "train.parquet")
    monkeypatch.setenv("MOE_ZOO_DATA", str(tmp_path))
    documents = data.question_answering_documents()
    assert [(document.key, document.domain) for document in documents] == [
        ("A", "squad"),
        ("short", "reviews"),
        ("B", "squad"),
    ]


@pytest.mark.parametrize("objective", study.OBJECTIVES)
def test_batches(objective):
    ids = corpus_of(16).train.ids[:6]
    batch = data.make_batch(ids, objective, torch.Generator().manual_seed(0))
    if objective == "masked":
        assert (batch.ids[batch.scored] == data.MASK).all() and torch.equal(batch.targets, ids[batch.scored])
        assert torch.equal(batch.ids[~batch.scored], ids[~batch.scored])
    else:
        assert torch.equal(batch.ids, ids) and torch.equal(batch.targets, ids[:, 1:].flatten())
    parts = list(batch.split(4))
    assert [len(part.ids) for part in parts] == [4, 2]
    assert torch.equal(torch.cat([part.targets for part in parts]), batch.targets)
    assert all(len(part.targets) == int(part.scored.sum()) for part in parts)


def test_specialisation():
    domain = torch.tensor([0, 0, 1, 1])
    apart = torch.tensor([[4.0, 0.0], [4.0, 0.0], [0.0, 4.0], [0.0, 4.0]])
    assert measure.specialisation(apart, domain, 2) == pytest.approx(1)
    assert measure.specialisation(torch.ones(4, 2), domain, 2) == pytest.approx(0, abs=1e-6)
    assert measure.specialisation(apart, domain[[0, 2, 1, 3]], 2) == pytest.approx(0, abs=1e-6)


def test_intervals_over_seeds_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    values = {"a": [0.31, 0.35, 0.29], "b": [0.41, 0.40, 0.44]}
    rows = {name: [{"seed": seed, "val_loss": value} for seed, value in enumerate(of)] for name, of in values.items()}
    claim = claims.Claim("A", "a is lower", "a", "b", claims.loss, "lower")
    line = claims.judge(claim, {**rows, "a": [*rows["a"], {"seed": 7, "val_loss": 9.0}]})
    interval = stats.ttest_rel(values["a"], values["b"]).confidence_interval(0.95)
    assert line["seeds"] == 3
    assert (line["difference"] - line["+-"], line["difference"] + line["+-"]) == pytest.approx(
        tuple(interval), rel=1e-3
    )
    assert claims.judge(claim, {"a": rows["a"]}) is None


@pytest.mark.parametrize(
    ("rule", "mean", "half", "words"),
    [
        ("lower", -0.02, 0.01, claims.SHOWS),
        ("lower", -0.02, 0.03, claims.OPEN),
        ("lower", 0.02, 0.03, claims.SHOWS_NOT),
        ("lower", 0.02, 0.01, claims.OPPOSITE),
        ("higher", 0.02, 0.01, claims.SHOWS),
        ("higher", -0.02, 0.01, claims.OPPOSITE),
        ("same", 0.001, 0.005, claims.SHOWS),
        ("same", 0.001, 0.02, claims.OPEN),
        ("same", 0.02, 0.015, claims.SHOWS_NOT),
        ("same", 0.03, 0.01, claims.OPPOSITE),
    ],
)
def test_verdicts(rule, mean, half, words):
    assert claims.verdict(rule, mean, half) == words


@pytest.mark.parametrize(("micro_batch", "window", "opened"), [(4, 8, 4), (4, 16, 2), (4, 128, 1), (0, 0, 0)])
def test_windows_open_as_often_as_they_should(monkeypatch, micro_batch, window, opened):
    calls = []
    monkeypatch.setattr(study, "open_count_windows", calls.append)
    method = study.Method(METHODS["top2"].design, "", micro_batch=micro_batch, window=window)
    study.Trainer(method, 0, corpus_of(16), study.BUDGETS["generated"], 2, "masked").run()
    assert len(calls) == opened


def test_importing_needs_no_tokenizers():
    for path in study.FOLDER.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"tokenizers", "transformers"}, path


def test_retrofit_keeps_the_trained_columns_and_trains_on():
    trainer = study.Trainer(METHODS["retrofit-null"], 0, corpus_of(16), study.BUDGETS["generated"], 10, "masked")
    before = {}
    for step in range(10):
        if step == 6:
            before = {name: layer.router.weight.clone() for name, layer in routed_modules(trainer.model).items()}
        trainer.follow_schedules(step)
    layers = routed_modules(trainer.model)
    assert layers and all(isinstance(layer.router, NullExpertRouter) for layer in layers.values())
    for name, layer in layers.items():
        assert torch.equal(layer.router.weight[: len(before[name])], before[name])
        assert any(layer.router.weight is parameter for parameter in trainer.optimizer.param_groups[0]["params"])
    row = study.Trainer(METHODS["retrofit-null"], 0, corpus_of(16), study.BUDGETS["generated"], 10, "masked").run()
    assert 0 < row["active_experts"] < 4
