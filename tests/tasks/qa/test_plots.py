"""The figures are written, and say in words and numbers what a reader looks for."""

import numpy as np
import pytest

from tasks.qa import plots
from tasks.qa.evaluate import Report, Scores
from tasks.qa.examples import Example
from zoo.moe import Dependence

OOD = ("race", "duorc")


@pytest.fixture
def drawn(monkeypatch):
    """Figures as they are saved."""
    figures = []
    save = plots.save_figure
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: (figures.append(figure), save(figure, path))[1])
    return figures


def report(domains, models: int = 2, documents: int = 10) -> Report:
    random = np.random.default_rng(0)
    examples = [
        Example(f"{domain} {number}", domain, f"{domain} {number % documents}", "?", "text")
        for domain in domains
        for number in range(30)
    ]
    scores = {
        f"model {number}": [Scores(*random.uniform(0, 100, (2, len(examples)))) for _ in range(2)]
        for number in range(models)
    }
    return Report.of(examples, scores, [name for name in OOD if name in domains])


def names(axes) -> list[str]:
    return [tick.get_text() for tick in axes.get_xticklabels()]


@pytest.mark.parametrize("models", [1, 5])
def test_scores(tmp_path, drawn, models) -> None:
    of = report(["race", "squad", "natural_questions", "duorc"], models)
    assert plots.plot_scores(of, tmp_path / "f1.png").stat().st_size > 1000
    inside, outside, macro = drawn[0].axes
    assert [axes.get_title("left") for axes in drawn[0].axes] == [
        "In domain: learned from",
        "Out of domain (OOD)",
        "Macro",
    ]
    assert names(inside) == ["squad\nn=30", "natural\nquestions\nn=30"]
    assert names(outside) == ["race\nn=30", "duorc\nn=30"]
    assert names(macro) == ["in domain\n(mean of 2)", "OOD\n(mean of 2)"]
    last = f"model {models - 1}"
    expected = {
        inside: ["squad/f1", "natural_questions/f1"],
        outside: ["race/f1", "duorc/f1"],
        macro: ["f1_in", "f1_ood"],
    }
    for axes, keys in expected.items():
        bars = [container for container in axes.containers if hasattr(container, "patches")]
        lines = [container.lines[2][0] for container in axes.containers if not hasattr(container, "patches")]
        assert len(bars) == len(lines) == models
        np.testing.assert_allclose([bar.get_height() for bar in bars[-1]], [of.metrics(last)[key] for key in keys])
        for line, key in zip(lines[-1].get_segments(), keys, strict=True):
            np.testing.assert_allclose(line[:, 1], of.interval(last, key)[1:])
    assert inside.get_facecolor() == macro.get_facecolor() != outside.get_facecolor()
    assert not inside.texts and not outside.texts
    assert [text.get_text() for text in macro.texts][-2:] == [f"{of.metrics(last)[key]:.1f}" for key in expected[macro]]
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == list(of.scores)


def test_chosen_models_and_measure(tmp_path, drawn) -> None:
    of = report(["squad", "race"], 3)
    plots.plot_scores(of, tmp_path / "em.png", ["model 2", "model 0"], "em")
    inside = drawn[0].axes[0]
    assert [bars.patches[0].get_height() for bars in inside.containers if hasattr(bars, "patches")] == [
        pytest.approx(of.metrics(model)["squad/em"]) for model in ("model 2", "model 0")
    ]
    assert inside.get_ylabel() == "EM (%)"


@pytest.mark.parametrize(("domain", "title"), [("own", "In domain: learned from"), ("race", "Out of domain (OOD)")])
def test_scores_of_one_domain_of_one_document(tmp_path, drawn, domain, title) -> None:
    """There is no other kind to draw, and no interval."""
    assert plots.plot_scores(report([domain], documents=1), tmp_path / "f1.png").stat().st_size > 1000
    assert [axes.get_title("left") for axes in drawn[0].axes] == [title, "Macro"]
    assert len(drawn[0].axes[1].texts) == 2


@pytest.mark.parametrize("experts", [4, 24])
def test_shares(tmp_path, drawn, experts) -> None:
    random = np.random.default_rng(0)
    domains = ["race", "squad", "policyqa", "duorc"]
    layers = {layer: {name: random.dirichlet(np.ones(experts)) for name in domains} for layer in ("layer.4", "layer.5")}
    layers["layer.4"]["race"][:] = np.eye(experts)[1]
    dependence = {"layer.4": Dependence(0.1234, 0.05, 0.01)}
    assert plots.plot_shares(layers, tmp_path / "shares.png", OOD, dependence).stat().st_size > 1000
    first, second = drawn[0].axes[:2]
    order = ["squad", "policyqa", "race", "duorc"]
    assert [tick.get_text() for tick in first.get_yticklabels()] == ["squad", "policyqa", "race (OOD)", "duorc (OOD)"]
    assert first.get_title("left") == "layer.4\nthe domain explains 12.3 %\nof the choices, chance 5.0 %"
    assert second.get_title("left") == "layer.5"
    for axes, shares in zip((first, second), layers.values(), strict=True):
        (image,) = axes.get_images()
        loads = experts * np.stack([shares[name] for name in order])
        np.testing.assert_allclose(image.get_array(), np.maximum(loads, 1e-9))
        # An even share has the middle of the colours.
        assert image.norm(1) == pytest.approx(0.5) and image.norm(0.01) == 0 and image.norm(99) == 1
        written = [text.get_text() for text in axes.texts]
        assert written == ([f"{load:.2f}" for load in loads.ravel()] if experts == 4 else [])
        assert [line.get_ydata()[0] for line in axes.get_lines()] == [1.5]


def test_shares_without_other_domains(tmp_path, drawn) -> None:
    plots.plot_shares({"head": {"own": np.array([0.25, 0.75])}}, tmp_path / "shares.png")
    axes = drawn[0].axes[0]
    assert not axes.get_lines() and [text.get_text() for text in axes.texts] == ["0.50", "1.50"]
    assert "OOD" not in drawn[0].get_suptitle()
