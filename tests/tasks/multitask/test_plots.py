"""The figures are written, and say in words and numbers what a reader looks for."""

import numpy as np
import pytest

from tasks.multitask import plots
from tasks.multitask.evaluate import Report, ScoredTask
from zoo.moe import Dependence


@pytest.fixture
def drawn(monkeypatch):
    """Figures as they are saved."""
    figures = []
    save = plots.save_figure
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: (figures.append(figure), save(figure, path))[1])
    return figures


def test_scores(tmp_path, drawn):
    random = np.random.default_rng(0)
    tasks = [ScoredTask(name, "accuracy", random.integers(2, size=50)) for name in ("cola", "arc_easy")]
    run = {task.name: task.targets for task in tasks}
    report = Report.of(tasks, {"ours": [run], "theirs": [run]})
    assert plots.plot_scores(report, tmp_path / "scores.png", ["theirs"]).stat().st_size > 1000
    (axes,) = drawn[0].axes
    names = [tick.get_text() for tick in axes.get_xticklabels()]
    assert names == ["cola\n(accuracy)\nn=50", "arc\neasy\n(accuracy)\nn=50", "average\nof all"]
    assert [bar.get_height() for bar in axes.patches] == [100, 100, 100]
    constant = [segment[0, 1] for segment in axes.collections[-1].get_segments()]
    np.testing.assert_allclose(
        constant, [report.values("majority", key)[0] for key in ("cola/accuracy", "arc_easy/accuracy", "average")]
    )


@pytest.mark.parametrize("experts", [4, 64])
def test_experts_show_the_module_that_tasks_explain_best(tmp_path, drawn, experts):
    random = np.random.default_rng(0)
    shares, dependence = {}, {}
    for layer in range(2):
        for part, explained in (("query", 0.1), ("value", 0.3 if layer == 1 else 0.05)):
            name = f"layer {layer} {part}"
            shares[name] = {task: random.dirichlet(np.ones(experts)) for task in ("cola", "rte")}
            dependence[name] = Dependence(explained, 0.01, 0.5)
    plots.plot_experts(shares, dependence, tmp_path / "experts.png")
    titles = [axes.get_title("left") for axes in drawn[0].axes if axes.get_title("left")]
    assert [title.split("\n")[0] for title in titles] == ["layer 0 query", "layer 1 value"]
    assert titles[1].endswith("task explains 30.0 % of the choices, chance 1.0 %")
    image = drawn[0].axes[0].images[0].get_array()
    table = np.stack(list(shares["layer 0 query"].values())) * experts
    order = np.arange(experts) if experts == 4 else plots.needed_by(table)
    np.testing.assert_allclose(image, table[:, order])
    plots.plot_dependence(dependence, tmp_path / "dependence.png")
    texts = [text.get_text() for text in drawn[1].axes[0].texts]
    assert texts == ["9.0", "9.0", "4.0", "29.0"]


def test_experts_are_ordered_by_the_task_that_needs_them():
    table = np.array([[0.1, 0.5, 0.1, 0.3], [0.4, 0.1, 0.4, 0.1]])
    assert plots.needed_by(table).tolist() == [1, 3, 0, 2]
    assert plots.layer_and_part("pooler") == ("", "pooler")
