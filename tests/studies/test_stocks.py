"""The harness of studies/stocks on a generated market: rows once, ensembles, paired differences, a checkpoint."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import zoo
from studies.stocks import study
from studies.stocks.methods import METHODS
from tasks.stocks.evaluate import average_scores
from zoo.errors import UnknownNameError

CHOSEN = ("miga-conv", "twin", "ridge", "low-volatility")
SMALL = {"hidden_dim": 8, "expert_dim": 4, "num_groups": 2, "experts_per_group": 3, "top_k": 2}


def arguments(folder, *more):
    return ["--source", "generated", "--folder", str(folder), "--seeds", "0", "1", "--methods", *CHOSEN, *more]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Results of two seeds of small networks."""
    small = {
        name: replace(METHODS[name], network={**METHODS[name].network, **SMALL}, epochs=1)
        for name in ("miga-conv", "twin")
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, method in small.items():
            patch.setitem(METHODS, name, method)
        path = tmp_path_factory.mktemp("stocks")
        study.main(arguments(path))
        study.main(arguments(path, "--release", "miga-conv", "--out", str(path / "five")))
        yield path


def row(folder, name):
    return json.loads((folder / "results" / f"generated.{name}.json").read_text())


def test_each_seed_has_one_row(folder):
    names = {path.name.split(".", 1)[1] for path in (folder / "results").iterdir()}
    assert names == {
        *(f"{method}.seed{seed}.json" for method in ("miga-conv", "twin") for seed in (0, 1, "s0-1")),
        *("ridge.seed0.json", "low-volatility.seed0.json"),
    }
    first = row(folder, "miga-conv.seed0")
    assert len(first["test"]["daily"]["IC"]) == len(first["test"]["daily"]["excess_cost"])
    assert first["val"]["metrics"]["RankIC"] == pytest.approx(first["best_val_RankIC"], abs=1e-5)
    assert row(folder, "low-volatility.seed0")["test"]["metrics"]["neutral_RankIC"] is None


def test_tables(folder):
    results = json.loads((folder / "generated.json").read_text())
    assert [line["method"] for line in results["test"]] == list(CHOSEN)
    assert {"ensemble RankIC", "RankIC std"} <= set(results["test"][0])
    differences = {(line["compared"], line["metric"]): line for line in results["differences"]}
    between = differences["miga-conv - twin", "IC"]
    means = [
        np.mean([row(folder, f"{name}.seed{seed}")["test"]["metrics"]["IC"] for seed in (0, 1)])
        for name in ("miga-conv", "twin")
    ]
    assert between["mean"] == pytest.approx(means[0] - means[1], abs=1e-5)
    assert between["low"] <= between["mean"] <= between["high"]
    assert (folder / "generated.rank_ic.png").is_file() and (folder / "generated.excess.png").is_file()


def test_a_second_call_runs_nothing(folder, monkeypatch):
    monkeypatch.setattr(study, "run", None)
    study.main(arguments(folder))


def test_fewer_seeds_are_another_ensemble(folder, monkeypatch):
    monkeypatch.setattr(study, "run", None)
    names = sorted(path.name for path in (folder / "results").iterdir())
    study.main(["--source", "generated", "--folder", str(folder), "--seeds", "0", "--methods", "miga-conv"])
    assert sorted(path.name for path in (folder / "results").iterdir()) == names
    assert "ensemble RankIC" not in json.loads((folder / "generated.json").read_text())["test"][0]
    study.main(arguments(folder, "--only", "table"))


def test_a_killed_run_leaves_nothing_that_is_released(tmp_path, monkeypatch):
    small = replace(METHODS["twin"], network={**METHODS["twin"].network, **SMALL}, epochs=1)
    monkeypatch.setitem(METHODS, "twin", small)
    run = tmp_path / "runs/generated.twin.seed0"
    run.mkdir(parents=True)
    (run / "best.ckpt").write_bytes(b"half of it")
    study.main(["--source", "generated", "--folder", str(tmp_path), "--seeds", "0", "--methods", "twin"])
    assert [path.name for path in run.glob("*.ckpt")] == ["best.ckpt"]
    assert torch.load(run / "best.ckpt", weights_only=True)["state_dict"]


def test_the_released_ensemble_ranks_as_its_seeds_do_together(folder):
    ensemble = zoo.load(folder / "five")
    days = study.load_days(study.parse(arguments(folder)), METHODS["miga-conv"]).test_set
    kept = [study.read_scores(folder / f"cache/generated.miga-conv.seed{seed}.npz")["test"] for seed in (0, 1)]
    np.testing.assert_allclose(study.score_days(ensemble.members[1], days), kept[1], atol=1e-6)
    together, ours = average_scores(np.stack(kept)), study.score_days(ensemble, days)
    there = np.isfinite(ours)
    assert np.corrcoef(together[there], ours[there])[0, 1] > 0.9


def test_bad_words(tmp_path):
    with pytest.raises(UnknownNameError, match="'miga-conv'"):
        study.main(["--methods", "miga-con"])
    for words in (["--source", "generated"], ["--release", "twin"], ["--out", str(tmp_path)]):
        with pytest.raises(SystemExit):
            study.main(words)
