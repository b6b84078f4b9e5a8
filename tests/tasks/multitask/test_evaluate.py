"""Metrics against scikit-learn, bootstraps against loops, paired differences."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from tasks.multitask.evaluate import (
    MAJORITY,
    Report,
    ScoredTask,
    confusion,
    majority,
    normalise_loads,
    score,
)
from zoo.comparison import RESAMPLES
from zoo.errors import UnknownNameError

RANDOM = np.random.default_rng(0)


def answers(targets, right):
    """Some right, the others drawn."""
    drawn = RANDOM.integers(targets.max() + 1, size=len(targets))
    return np.where(RANDOM.random(len(targets)) < right, targets, drawn)


@pytest.mark.parametrize("classes", [2, 5])
def test_metrics_are_those_of_scikit_learn(classes):
    for _ in range(6):
        targets = RANDOM.integers(classes, size=60)
        predicted = answers(targets, RANDOM.random())
        for positive in range(classes):
            found = score(confusion(targets, predicted, "f1"), "f1", positive)
            expected = f1_score(targets == positive, predicted == positive, zero_division=0)
            assert found == pytest.approx(100 * expected)
        expected = 100 * matthews_corrcoef(targets, predicted)
        assert score(confusion(targets, predicted, "matthews"), "matthews") == pytest.approx(expected)
        found = score(confusion(targets, predicted, "accuracy"), "accuracy")
        assert found == pytest.approx(100 * accuracy_score(targets, predicted))


def test_f1_of_a_class_that_is_neither_right_nor_predicted_is_0():
    targets, predicted = np.array([0, 1, 0]), np.array([0, 0, 0])
    assert score(confusion(targets, predicted, "f1"), "f1", 2) == 0
    draws = np.ones((5, 3), dtype=np.float32)
    np.testing.assert_array_equal(score(confusion(targets, predicted, "f1", draws), "f1", 2), np.zeros(5))
    task = ScoredTask("own", "f1", targets, positive=2)
    report = Report.of([task], {"ours": [{"own": predicted}]})
    found = report.interval("ours", "own/f1")
    assert (found.mean, found.low, found.high) == (0, 0, 0)


def test_constant_answers():
    targets = np.array([0, 1, 1, 1])
    assert majority(targets).tolist() == [1, 1, 1, 1]
    for predicted in (np.zeros(4, int), np.ones(4, int)):
        assert score(confusion(targets, predicted, "matthews"), "matthews") == 0
    assert score(confusion(targets, np.zeros(4, int), "f1"), "f1") == 0
    assert score(confusion(np.zeros(4, int), np.zeros(4, int), "f1"), "f1") == 0


def make(names=("cola", "rte", "mrpc", "sst2", "other"), size=80):
    metrics = {"cola": "matthews", "mrpc": "f1"}
    return [
        ScoredTask(n, metrics.get(n, "accuracy"), RANDOM.integers(2, size=size + 7 * i)) for i, n in enumerate(names)
    ]


def predict(tasks, right):
    return {task.name: answers(task.targets, right) for task in tasks}


def by_hand(task, predicted, places=None):
    places = np.arange(len(predicted)) if places is None else places
    targets, predicted = task.targets[places], predicted[places]
    metric = {"matthews": matthews_corrcoef, "f1": f1_score, "accuracy": accuracy_score}[task.metric]
    return 100 * metric(targets, predicted)


def test_averages_and_rows():
    tasks = make()
    runs = [predict(tasks, 0.5), predict(tasks, 0.6)]
    report = Report.of(tasks, {"ours": runs})
    means = [[by_hand(task, run[task.name]) for task in tasks] for run in runs]
    np.testing.assert_allclose(report.values("ours", "average"), np.mean(means, axis=1))
    np.testing.assert_allclose(report.values("ours", "average_glue"), np.mean(means, axis=1, where=[1, 1, 1, 1, 0]))
    metrics = report.metrics("ours")
    assert metrics["cola/matthews"] == pytest.approx(np.mean(means, axis=0)[0])
    assert {"cola/accuracy", "mrpc/f1", "mrpc/accuracy", "rte/accuracy"} <= metrics.keys()
    constant = report.metrics(MAJORITY)
    assert constant["cola/matthews"] == 0 and constant["rte/accuracy"] >= 50
    rows = report.task_rows("ours")
    assert [row["task"] for row in rows] == ["cola", "rte", "mrpc", "sst2", "other", "average", "average_glue"]
    assert rows[1]["majority"] == pytest.approx(constant["rte/accuracy"])
    assert rows[-1]["n"] == sum(len(task.targets) for task in tasks)
    assert [row["method"] for row in report.rows()] == ["ours", "+- over 2 seeds", MAJORITY]
    assert "average_glue" not in Report.of(tasks[:2], {"ours": runs}).metric_names()


def test_an_interval_is_that_of_a_naive_bootstrap():
    tasks = make(("cola", "mrpc"), 60)
    run = predict(tasks, 0.6)
    report = Report.of(tasks, {"ours": [run]})
    draws = {name: of.astype(int) for name, of in report.draws.items()}
    assert all(of.shape == (RESAMPLES, len(task.targets)) for of, task in zip(draws.values(), tasks, strict=True))
    naive = [
        np.mean([by_hand(t, run[t.name], np.repeat(np.arange(len(t.targets)), draws[t.name][d])) for t in tasks])
        for d in range(40)
    ]
    np.testing.assert_allclose(report.resample("ours", "average")[:40, 0], naive, rtol=1e-5)
    found = report.interval("ours", "average")
    assert found.low < found.mean < found.high


def test_differences_are_paired():
    tasks = make(("rte",), 300)
    targets = tasks[0].targets
    ours, theirs = targets.copy(), targets.copy()
    ours[:100], theirs[:115] = 1 - targets[:100], 1 - targets[:115]
    report = Report.of(tasks, {"ours": [{"rte": ours}], "theirs": [{"rte": theirs}], "same": [{"rte": ours}]})
    found = report.difference("ours", "theirs", "average")
    assert found.mean == pytest.approx(5) and 0 < found.low < 5 < found.high and found.p_value < 0.01
    # Unpaired, the same 5 points would be within the noise.
    assert report.interval("ours", "average").low < report.interval("theirs", "average").high
    same = report.difference("ours", "same", "average")
    assert same[:3] == (0, 0, 0) and same.p_value == 1
    assert report.difference("theirs", "ours", "average").p_value == found.p_value
    assert [row["metric"] for row in report.difference_rows("ours", "theirs")] == ["average", "rte/accuracy"]


def test_seeds_widen_an_interval():
    tasks = make(("rte",), 2000)
    alike, unlike = ([predict(tasks, right) for right in rights] for rights in ((0.5, 0.5, 0.5), (0.2, 0.5, 0.8)))
    report = Report.of(tasks, {"alike": alike, "unlike": unlike})
    widths = [np.ptp(report.interval(name, "average")[1:]) for name in ("alike", "unlike")]
    assert widths[1] > 3 * widths[0]


def test_what_does_not_fit():
    tasks = make(("rte", "sst2"))
    run = predict(tasks, 0.5)
    with pytest.raises(ValueError, match=r"'ours' predict \[5\] examples of the task 'rte'; there are 80"):
        Report.of(tasks, {"ours": [run | {"rte": np.zeros(5, int)}]})
    with pytest.raises(ValueError, match="no task to report on"):
        Report.of([], {})
    with pytest.raises(UnknownNameError, match="metric of the task 'rte' 'bleu'"):
        ScoredTask("rte", "bleu", np.zeros(3, int))
    with pytest.raises(ValueError, match="has no example"):
        ScoredTask("rte", "f1", np.zeros(0, int))
    report = Report.of(tasks, {"ours": [run]})
    with pytest.raises(UnknownNameError, match="metric 'rte/f1'"):
        report.values("ours", "rte/f1")
    with pytest.raises(UnknownNameError, match="method 'our'"):
        report.values("our", "average")


def test_every_example_weighs_as_much_as_another():
    found = normalise_loads({"layer": np.array([[1.0, 3], [10, 10]], dtype=np.float32)})["layer"]
    np.testing.assert_allclose(found, [[0.25, 0.75], [0.5, 0.5]])
