"""Parts and their sizes, what each source reads, what prediction is asked, main metrics, bad arguments."""

import os
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from tasks.multitask.data import TASKS, MultitaskDataModule
from tasks.multitask.encode import Form
from tests.tasks.multitask.builders import ARC
from zoo.errors import DataNotFoundError, UnknownNameError


def nlp_tasks(root: Path, count: int = 40) -> str:
    """The layout of the development data, generated."""
    (root / "nlp_tasks").mkdir()
    rows = []
    for number in range(count):
        parity = number % 2
        rows += [
            {"task": "cola", "text": f"sentence {number}", "label": ("acceptable", "unacceptable")[parity]},
            {
                "task": "mrpc",
                "text": f"one {number}",
                "text2": "two",
                "label": ("paraphrase", "not_paraphrase")[parity],
            },
            {"task": "arc_easy", "text": ARC.replace("hot", f"hot {number}"), "label": f"answer{1 + number % 3}"},
            {"task": "scienceqa", "text": f"why {number}", "choices": ["so", "not"], "label": ("so", "not")[parity]},
        ]
    for part in ("train", "eval"):
        table = pd.DataFrame(rows).assign(split=part, source="test", dup_of_train=False)
        table.loc[0, "dup_of_train"] = part == "eval"
        table.to_parquet(root / "nlp_tasks" / f"{part}.parquet")
    return str(root)


def test_the_development_data(tmp_path, encoder):
    data = MultitaskDataModule(nlp_tasks(tmp_path), cap=30, score_cap=4)
    data.setup("fit")
    data.setup("test")
    assert data.learned == {
        "cola": ["acceptable", "unacceptable"],
        "mrpc": ["not_paraphrase", "paraphrase"],
        "arc_easy": [],
        "scienceqa": [],
    }
    counts = {part: Counter(e.task for e in of) for part, of in data.examples.items()}
    assert set(counts["train"].values()) <= {26, 27} and set(counts["val"].values()) <= {2, 3, 4}
    assert set(counts["test"].values()) == {4}
    assert sorted(counts["test"], key=TASKS.index) == list(counts["test"])
    choice = next(e for e in data.examples["train"] if e.task == "arc_easy")
    assert choice.text.startswith("What is hot") and choice.choices == ("ice", "fire, or so", "snow")
    data.encode(Form(encoder, data.learned))
    batches = list(data.train_dataloader())
    assert sum(len(batch.places) for batch in batches) == len(data.examples["train"])
    assert f"{len(data.examples['train'])} examples of nlp_tasks" in data.describe()
    assert f"cola {counts['train']['cola']}, mrpc" in data.describe()
    inside = MultitaskDataModule(data.root, choices_inside=True, tasks=["arc_easy"])
    inside.setup("fit")
    assert inside.learned == {"arc_easy": ["answer1", "answer2", "answer3"]}
    assert "Answer2: fire" in inside.examples["train"][0].text
    with pytest.raises(UnknownNameError, match="task of the train part of nlp_tasks 'colla'"):
        MultitaskDataModule(data.root, tasks=["colla"]).setup("fit")
    with pytest.raises(DataNotFoundError, match="source=hub"):
        MultitaskDataModule(str(tmp_path / "nlp_tasks")).setup("test")


@pytest.mark.skipif("MOE_ZOO_DATA" not in os.environ, reason="needs the development data: set MOE_ZOO_DATA")
def test_the_real_development_data():
    data = MultitaskDataModule()
    data.setup("test")
    counts = Counter(e.task for e in data.examples["test"])
    assert sum(counts.values()) == 5843 and tuple(counts) == TASKS
    assert sum(e.in_training for e in data.examples["test"]) == 8
    assert all(len(e.choices) >= 2 for e in data.examples["test"] if e.task.startswith("arc"))
    assert not any("Answer format" in e.text for e in data.examples["test"])


def test_generated_tasks_in_equal_steps(encoder):
    data = MultitaskDataModule(
        source="generated", tasks=["mood", "which"], epoch_size=64, sampling="uniform", batch_size=8
    )
    data.setup("fit")
    data.encode(Form(encoder, data.learned))
    loader = data.train_dataloader()
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        places = [place for batch in loader for place in batch.places]
        assert Counter(data.train_set.examples[place].task for place in places) == {"mood": 32, "which": 32}
    assert "(synthetic)" in data.describe() and "uniform sampling" in data.describe()
    # What is cut is cut again only where the model wants something else.
    cut = data.train_set
    data.encode(Form(encoder, dict(data.learned)))
    assert data.train_set is cut
    data.encode(Form(encoder, data.learned, verbalised=True))
    assert data.train_set is not cut
    longest = [batch.input_ids.shape[1] for batch in data.val_dataloader()]
    assert longest == sorted(longest, reverse=True)


def test_files_of_the_user_s_own(tmp_path, encoder):
    rows = [{"sentence": f"film {n}", "label": ("good", "bad")[n % 2]} for n in range(40)]
    pd.DataFrame(rows).to_csv(tmp_path / "own.csv", index=False)
    columns = {"text": "sentence"}
    data = MultitaskDataModule(source="file", file=str(tmp_path / "own.csv"), columns=columns)
    data.setup("fit")
    assert data.learned == {"own": ["bad", "good"]} and len(data.examples["train"]) == 36
    with pytest.raises(DataNotFoundError, match=r"--data\.test_file FILE"):
        data.setup("test")
    pd.DataFrame([{"sentence": "film", "label": "great"}]).to_csv(tmp_path / "test.csv", index=False)
    data = MultitaskDataModule(source="file", test_file=str(tmp_path / "test.csv"), columns=columns)
    data.setup("test")
    with pytest.raises(UnknownNameError, match="label of the task 'own' 'great'"):
        data.encode(Form(encoder, {"own": ["bad", "good"]}))


def test_what_prediction_is_asked(encoder):
    form = Form(encoder, {"mood": ["negative", "positive"], "which": []})
    data = MultitaskDataModule(task="which", text="an animal", choices=["cat", "saw"])
    data.setup("predict")
    data.encode(form)
    (example,) = data.predict_set.examples
    assert (example.task, example.kind, example.label) == ("which", "choices", None)
    data = MultitaskDataModule(text="great")
    data.setup("predict")
    with pytest.raises(UnknownNameError, match=r"Unknown task 'own'.*data\.task"):
        data.encode(form)
    data.encode(Form(encoder, {"mood": ["negative", "positive"]}))
    assert data.predict_set.examples[0].task == "mood"
    with pytest.raises(ValueError, match="nothing to predict"):
        MultitaskDataModule().setup("predict")


def test_main_metrics():
    data = MultitaskDataModule(metrics={"spam": "f1", "own": "matthews"}, positive={"spam": "spam"})
    assert data.metric_of("cola", ["a", "b"])[0] == "matthews"
    assert data.metric_of("mrpc", ["not_paraphrase", "paraphrase"]) == ("f1", 1)
    assert data.metric_of("mrpc", ["equivalent", "not_equivalent"]) == ("f1", 0)
    assert data.metric_of("spam", ["ham", "spam"]) == ("f1", 1)
    assert data.metric_of("own", ["a", "b", "c"])[0] == "matthews"
    assert data.metric_of("rte", ["a", "b"])[0] == data.metric_of("which", [])[0] == "accuracy"
    # A user's task may have a name of GLUE and choices.
    assert data.metric_of("cola", [])[0] == "accuracy"
    with pytest.raises(ValueError, match="has no classes of its own"):
        data.metric_of("own", [])
    with pytest.raises(ValueError, match=r"say which by data\.positive: \{mrpc: no\}"):
        data.metric_of("mrpc", ["maybe", "no"])


def test_a_metric_of_a_task_that_is_not_there(encoder):
    data = MultitaskDataModule(source="generated", metrics={"moot": "f1"})
    data.setup("fit")
    with pytest.raises(UnknownNameError, match="'moot'"):
        data.encode(Form(encoder, data.learned))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"source": "glue"}, "Unknown source of tasks 'glue'"),
        ({"sampling": "even"}, "Unknown sampling"),
        ({"temperature": 0.5}, "temperature"),
        ({"file": "a.csv"}, "no effect on source='nlp_tasks'"),
        ({"columns": {"text": "a"}}, "no effect"),
        ({"cap": 0}, "cap=0"),
        ({"epoch_size": 0}, "epoch_size=0"),
        ({"task": "mood"}, r"data\.task says more of a text"),
    ],
)
def test_arguments_that_do_not_fit(arguments, words):
    with pytest.raises(ValueError, match=words):
        MultitaskDataModule(**arguments)
