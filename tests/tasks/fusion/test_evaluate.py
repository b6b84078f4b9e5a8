"""The protocol: intervals, rank correlations against SciPy, figures."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from tasks.fusion import evaluate
from tasks.fusion.baselines import BASELINES
from tasks.fusion.metrics import METRICS, NINE_METRICS
from tasks.fusion.model import MoEFusion


def scores(shift: float, pairs: int = 30) -> list[dict[str, dict[str, float]]]:
    random = np.random.default_rng(0)
    table = []
    for _ in range(pairs):
        twin = {name: float(value) for name, value in zip(METRICS, random.normal(size=len(METRICS)), strict=True)}
        ours = {name: value + shift + 0.1 * float(random.normal()) for name, value in twin.items()}
        table.append({evaluate.OURS: ours, evaluate.TWIN: twin})
    return table


def test_paired_differences_see_what_pairs_share() -> None:
    for row in evaluate.paired_differences(scores(0.5), evaluate.OURS, evaluate.TWIN):
        assert row["low"] < row["difference"] < row["high"] and row["low"] > 0.4 and row["high"] < 0.6
    same = evaluate.paired_differences(scores(0.0), evaluate.OURS, evaluate.TWIN)
    assert sum(row["low"] <= 0 <= row["high"] for row in same) >= len(NINE_METRICS) - 2


def test_gate_correlations_are_spearmans() -> None:
    random = np.random.default_rng(0)
    brightness = random.random(40)
    table = random.dirichlet(np.ones(4), 40).round(1)
    (row,) = evaluate.gate_correlations({"whole": table}, brightness)
    expected = [spearmanr(table[:, expert], brightness).statistic for expert in range(4)]
    assert row["expert"] == int(np.abs(expected).argmax())
    assert row["rho"] == pytest.approx(expected[row["expert"]])
    assert row["p"] > 0.05
    follows = np.stack([brightness, 1 - brightness], 1)
    (row,) = evaluate.gate_correlations({"whole": follows}, brightness)
    assert abs(row["rho"]) == pytest.approx(1) and row["p"] == 0
    (row,) = evaluate.gate_correlations({"whole": np.ones((40, 2))}, brightness)
    assert row["rho"] == 0 and row["p"] == 1


def test_score_pair_holds_every_baseline() -> None:
    infrared, visible = torch.rand(1, 1, 48, 48), torch.rand(1, 1, 48, 48)
    scored = evaluate.score_pair(infrared, visible, {evaluate.OURS: infrared * 2 - 0.5})
    assert set(scored) == {evaluate.OURS, *BASELINES}
    table = evaluate.means([scored, scored])
    assert table["average"] == pytest.approx(scored["average"])
    places = evaluate.ranks(table)
    assert set(places) == {evaluate.OURS, *BASELINES}
    assert sum(places.values()) == pytest.approx(sum(range(1, 7)))


def test_random_gates_change_the_gates_alone() -> None:
    model = MoEFusion()
    changed = evaluate.with_random_gates(model)
    for (name, before), after in zip(model.named_parameters(), changed.parameters(), strict=True):
        assert torch.equal(before, after) != name.endswith("router.weight"), name


def test_figures_are_written(tmp_path) -> None:
    shares = {"foreground": np.eye(4)[[0, 1, 2]], "whole": np.full((3, 4), 0.25)}
    brightness, night = np.array([0.1, 0.5, 0.3]), np.array([True, False, True])
    rows = evaluate.gate_correlations(shares, brightness)
    assert evaluate.plot_gates(shares, brightness, night, rows, tmp_path / "gates.png").stat().st_size > 1000
    image = np.zeros((8, 8), dtype=np.float32)
    examples = [
        evaluate.Example("one", {"fused": image}, {"whole": [0.5, 0.5]}),
        evaluate.Example("two", {"fused": image}, {}),
    ]
    for chosen in (examples[:1], examples[1:]):
        assert evaluate.plot_contact_sheet(chosen, tmp_path / "pairs.png").stat().st_size > 1000
