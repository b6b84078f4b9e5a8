"""The real command line on generated questions and on files of the user's own, over a tiny base model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
import yaml
from command_line import sentence

import zoo
from tasks.qa.decode import Answer
from tasks.qa.evaluate import f1_score
from tasks.qa.examples import generate_examples
from tasks.qa.model import QAReader
from tasks.qa.task import OVERLAP, QATask, in_the_text, shares_in_words
from tests.tasks.qa.builders import save_base, word_pieces
from zoo import hub
from zoo.cli import main
from zoo.errors import UnknownNameError

CONFIGS = sorted(Path("configs/qa").glob("*.yaml"))
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
SMALL = ["--data.max_length=64", "--data.stride=16", "--trainer.max_epochs=1", *QUIET]
RELEASED = "qa/minilm-moe"
CONTEXT = "Ada Lovelace was born in London in 1815. She wrote the first program. " * 12


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny BERT and its tokenizer."""
    return save_base(tmp_path_factory.mktemp("base"), 64, 128)


def generated(base: str, limit: int = 12) -> list[str]:
    return ["--data.source=generated", f"--data.base={base}", f"--data.limit={limit}", *SMALL]


def network(base: str, **changes: Any) -> list[str]:
    return ["--model.network", json.dumps({"base": base, "num_experts": 3, **changes})]


@pytest.fixture(scope="module")
def trained(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    main(["fit", "-c", "configs/qa/minilm-moe.yaml", *network(base), *generated(base), "--out", str(folder)])
    return folder


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions of the user's own."""
    path = tmp_path_factory.mktemp("own") / "own.csv"
    rows = [
        {"question": e.question, "context": e.context, "answer": e.answers[0]} for e in generate_examples(24, seed=3)
    ]
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_learns(config: Path, base: str, trained: Path, own: Path, tmp_path: Path) -> None:
    if "pretrained" in config.read_text():
        model = ["--model.pretrained", str(trained / "checkpoint")]
    else:
        model = network(base, mixture="twin" not in config.stem)
    data = generated(base)
    if config.stem == "own":
        data = ["--data.file", str(own), f"--data.base={base}", *SMALL]
    main(["fit", "-c", str(config), *model, *data, "--out", str(tmp_path)])
    hub.verify(tmp_path / "checkpoint")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_no_config_takes_all_devices_that_there_are(config: Path) -> None:
    trainer = yaml.safe_load(config.read_text())["trainer"]
    assert trainer["accelerator"] == "cpu" or trainer["devices"] == 1


def test_fit_saves_the_best_epoch_without_the_base_but_trains_the_rest(trained: Path, base: str) -> None:
    state = torch.load(trained / "checkpoints/best.ckpt", weights_only=True)["state_dict"]
    model = zoo.load(trained / "checkpoint")
    assert state.keys() == {f"model.{name}" for name in model.state_dict()}
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[f"model.{name}"]), name
    assert not any("word_embeddings" in name for name in state)
    fresh = QAReader(base=base, num_experts=3)
    moved = [name for name, value in fresh.state_dict().items() if not torch.equal(value, model.state_dict()[name])]
    assert any("attention" in name for name in moved) and any("experts" in name for name in moved)


def test_dropout_is_on_in_training_alone(base: str) -> None:
    task = QATask({"base": base})
    assert all(module.training for module in task.modules() if isinstance(module, torch.nn.Dropout))


def test_test_scores_by_domain_beside_rivals(trained: Path, base: str, tmp_path: Path) -> None:
    checkpoint = str(trained / "checkpoint")
    command = ["test", "-c", "configs/qa/minilm-moe.yaml", "--model.network=null", f"--model.pretrained={checkpoint}"]
    main([*command, f"--model.twin={checkpoint}", *generated(base), "--out", str(tmp_path)])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    for name in ("f1_in", "em_in", "f1_ood", "em_ood"):
        assert 0 <= metrics[name] <= 100
        # The same checkpoint twice.
        assert metrics[f"twin/{name}"] == metrics[name] and metrics[f"minus_twin/{name}"] == 0
        assert f"{OVERLAP}/{name}" in metrics
    rows = pd.read_parquet(tmp_path / "predictions.parquet")
    domains = rows.groupby("domain")["f1"].mean()
    assert domains.index.nunique() > 2 and (rows.groupby("domain").size() == 12).all()
    for domain, f1 in domains.items():
        assert metrics[f"{domain}/f1"] == pytest.approx(f1)
    for row in rows.itertuples():
        assert row.f1 == pytest.approx(f1_score(row.answer, list(row.target)))
    assert rows["experts, layer 1"].str.contains("%").all()
    assert {"scores.png", "experts.png"} <= {path.name for path in tmp_path.iterdir()}


def test_a_checkpoint_is_tested_and_asked_as_it_was_trained(base: str, tmp_path: Path) -> None:
    data = [*generated(base), "--data.max_length=60", "--data.stage=joint", "--data.replay=5"]
    data += ["--data.augment", json.dumps({"copies": 1, "synonym": 0, "insert": 0})]
    decoding = {"allow_no_answer": True, "threshold": -100.0, "max_answer_tokens": 3}
    words = [f"--model.{name}={json.dumps(value)}" for name, value in decoding.items()]
    main(["fit", "-c", "configs/qa/minilm-moe.yaml", *network(base), *data, *words, "--out", str(tmp_path / "run")])
    checkpoint = tmp_path / "run/checkpoint"
    config = yaml.safe_load((checkpoint / "config.yaml").read_text())
    assert config["model"] == {"class_path": "tasks.qa.task.QATask", "init_args": decoding}
    known = config["data"]["init_args"]
    wanted = {"source": "generated", "base": base, "max_length": 60, "stride": 16, "stage": "joint", "limit": 12}
    assert wanted.items() <= known.items() and not known.keys() & {"augment", "replay", "file", "root"}
    main(["test", str(checkpoint), *QUIET, "--out", str(tmp_path / "test")])
    rows = pd.read_parquet(tmp_path / "test/predictions.parquet")
    assert (rows.groupby("domain").size() == 12).all()
    assert (rows["answer"] == "").all(), "at this threshold no text has an answer"
    asked = ["--data.question=Where was Ada Lovelace born?", f"--data.context={CONTEXT}"]
    main(["predict", str(checkpoint), *asked, "--model.threshold=100", *QUIET, "--out", str(tmp_path / "predict")])
    (row,) = pd.read_parquet(tmp_path / "predict/predictions.parquet").to_dict("records")
    assert 0 < len(row["answer"].split()) <= 3


def test_a_checkpoint_of_ones_own_questions_is_tested_on_a_file(
    trained: Path, base: str, own: Path, tmp_path: Path, capsys: Any
) -> None:
    command = ["fit", "-c", "configs/qa/own.yaml", f"--model.pretrained={trained / 'checkpoint'}", *SMALL]
    main([*command, f"--data.file={own}", f"--data.base={base}", "--out", str(tmp_path / "run")])
    checkpoint = tmp_path / "run/checkpoint"
    assert str(own) not in (checkpoint / "config.yaml").read_text()
    test = ["test", str(checkpoint), *QUIET, "--out", str(tmp_path / "test")]
    assert "Name their file with --data.test_file FILE." in sentence(capsys, *test)
    main([*test, f"--data.test_file={own}"])
    assert len(pd.read_parquet(tmp_path / "test/predictions.parquet")) == 24
    main(["predict", str(checkpoint), f"--data.file={own}", *QUIET, "--out", str(tmp_path / "predict")])
    assert len(pd.read_parquet(tmp_path / "predict/predictions.parquet")) == 24


def test_a_rival_on_another_base_is_refused(trained: Path, base: str, tmp_path: Path, capsys: Any) -> None:
    other = QAReader(base=save_base(tmp_path / "other", 32, 128))
    rival = zoo.save(other, tmp_path / "rival", card=hub.info(trained / "checkpoint").card)
    command = ["test", "-c", "configs/qa/minilm-moe.yaml", "--model.network=null", *generated(base)]
    command += [f"--model.pretrained={trained / 'checkpoint'}", "--out", str(tmp_path)]
    for name in ("twin", "dense"):
        said = sentence(capsys, *command, f"--model.{name}={rival}")
        assert f"The rival '{name}' is built on '{tmp_path / 'other'}'" in said and "Test it by itself." in said


def test_predict_answers_a_question_about_a_long_text(
    trained: Path, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(CONTEXT)
    command = ["predict", "-c", "configs/qa/minilm-moe.yaml", "--model.network=null"]
    asked = ["--data.question=Where was Ada Lovelace born?", f"--data.context_file={tmp_path / 'text.txt'}"]
    main(
        [
            *command,
            f"--model.pretrained={trained / 'checkpoint'}",
            *asked,
            f"--data.base={base}",
            *SMALL,
            "--out",
            str(tmp_path),
        ]
    )
    out = capsys.readouterr().out
    assert "Where was Ada Lovelace born?" in out and "Experts, layer 1:" in out
    (row,) = pd.read_parquet(tmp_path / "predictions.parquet").to_dict("records")
    assert row["answer"] == CONTEXT[row["start"] : row["end"]] and 0 < row["score"] <= 1


def test_predict_answers_a_file(trained: Path, base: str, own: Path, tmp_path: Path) -> None:
    command = ["predict", "-c", "configs/qa/own.yaml", f"--model.pretrained={trained / 'checkpoint'}"]
    main([*command, f"--data.file={own}", f"--data.base={base}", *SMALL, "--out", str(tmp_path)])
    rows = pd.read_parquet(tmp_path / "predictions.parquet")
    asked = pd.read_csv(own)
    assert rows["question"].tolist() == asked["question"].tolist()
    for row, context in zip(rows.itertuples(), asked["context"], strict=True):
        assert row.answer == context[row.start : row.end]


def test_a_second_stage_leaves_frozen_experts_bit_identical(trained: Path, base: str, tmp_path: Path) -> None:
    pretrained = ["--model.pretrained", str(trained / "checkpoint"), "--model.freezing", '{"freeze_experts": true}']
    main(["fit", "-c", "configs/qa/ood.yaml", *pretrained, *generated(base), "--out", str(tmp_path)])
    before, after = (zoo.load(folder / "checkpoint").state_dict() for folder in (trained, tmp_path))
    experts = {name for name in before if ".experts.experts." in name}
    assert experts and all(torch.equal(before[name], after[name]) for name in experts)
    assert any(not torch.equal(before[name], after[name]) for name in before.keys() - experts)


def test_a_second_stage_ends_with_an_average_of_both_readers(trained: Path, base: str, tmp_path: Path) -> None:
    command = ["fit", "-c", "configs/qa/ood.yaml", f"--model.pretrained={trained / 'checkpoint'}", *generated(base)]
    for mixing in ("1", "0.3"):
        main([*command, f"--model.mixing={mixing}", "--out", str(tmp_path / mixing)])
    origin = zoo.load(trained / "checkpoint").state_dict()
    learned, mixed = (zoo.load(tmp_path / mixing / "checkpoint").state_dict() for mixing in ("1", "0.3"))
    assert any(not torch.equal(learned[name], value) for name, value in origin.items())
    for name, value in mixed.items():
        torch.testing.assert_close(value, 0.7 * origin[name] + 0.3 * learned[name], msg=name)
    assert "an average, 30% of this" in hub.info(tmp_path / "0.3/checkpoint").card.data


def test_a_plain_reader_becomes_a_mixture(base: str, tmp_path: Path) -> None:
    plain = network(base, moe_layers=[], mixture=False)
    main(["fit", "-c", "configs/qa/minilm-moe.yaml", *plain, *generated(base), "--out", str(tmp_path / "plain")])
    started = [f"--model.upcycle={tmp_path / 'plain/checkpoint'}", "--model.mixing=0.5", "--model.lr=1e-12"]
    config = ["fit", "-c", "configs/qa/minilm-moe.yaml"]
    main([*config, *network(base), *started, *generated(base), "--out", str(tmp_path / "moe")])
    before, after = (zoo.load(tmp_path / name / "checkpoint") for name in ("plain", "moe"))
    assert after.mixture and not before.mixture
    torch.testing.assert_close(after.span.weight, before.span.weight)
    name = "encoder.layer.0.attention.self.query.weight"
    torch.testing.assert_close(after.encoder.get_parameter(name), before.encoder.get_parameter(name))


def test_the_shipped_reader_answers(minilm: str, tmp_path: Path) -> None:
    hub.verify(RELEASED)
    assert hub.info(RELEASED).size < 25e6
    (tmp_path / "text.txt").write_text("The lighthouse on Skerry Point was built by Margaret Aird, a mason, in 1874.")
    asked = ["--data.question=Who built the lighthouse?", f"--data.context_file={tmp_path / 'text.txt'}"]
    main(["predict", RELEASED, *asked, *QUIET, "--out", str(tmp_path)])
    (row,) = pd.read_parquet(tmp_path / "predictions.parquet").to_dict("records")
    assert row["answer"].startswith("Margaret Aird")


def test_bad_words_and_bases_that_differ(trained: Path, base: str, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(UnknownNameError, match="num_expert"):
        QATask({"num_expert": 3})
    with pytest.raises(UnknownNameError, match=r"argument of freezing 'freeze_expert'\. Did you mean 'freeze_experts'"):
        QATask(pretrained=str(trained / "checkpoint"), freezing={"freeze_expert": True})
    with pytest.raises(ValueError, match="is for a pretrained reader"):
        QATask({"base": base}, freezing={"freeze_experts": True})
    with pytest.raises(ValueError, match=r"mixing=0\.5: averages a reader with the pretrained one"):
        QATask({"base": base}, mixing=0.5)
    with pytest.raises(ValueError, match=r"mixing=0\.0: must be in \(0, 1\]"):
        QATask(pretrained=str(trained / "checkpoint"), mixing=0.0)
    with pytest.raises(ValueError, match="upcycle='b': name one of them"):
        QATask(pretrained="a", upcycle="b")
    with pytest.raises(ValueError, match="brings its own"):
        QATask({"base": base}, pretrained=str(trained / "checkpoint"))
    command = [
        "test",
        "-c",
        "configs/qa/minilm-moe.yaml",
        "--model.network=null",
        f"--model.pretrained={trained}/checkpoint",
    ]
    other = tmp_path / "other"
    word_pieces().save_pretrained(other)
    said = sentence(capsys, *command, *generated(str(other)), "--out", str(tmp_path))
    assert "set --data.base to the reader's" in said


def test_several_processes_are_refused(base: str, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(pl.Trainer, "world_size", 2)
    command = ["fit", "-c", "configs/qa/minilm-moe.yaml", *network(base), *generated(base), "--out", str(tmp_path)]
    said = sentence(capsys, *command)
    assert "The trainer has 2 processes. Answers need all windows" in said and "Set --trainer.devices=1" in said
    assert not (tmp_path / "checkpoint").exists()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_tiny_reader_learns_the_generated_questions(base: str, tmp_path: Path) -> None:
    data = [*generated(base), "--data.limit=null", "--data.max_length=128", "--data.batch_size=16"]
    options = ["--trainer.max_epochs=12", "--model.lr=2e-3", "--data.stage=joint", "--data.keep_empty=0.5"]
    command = ["fit", "-c", "configs/qa/minilm-moe.yaml", *network(base, freeze="nothing")]
    main([*command, *data, *options, "--out", str(tmp_path)])
    test = ["test", "-c", "configs/qa/minilm-moe.yaml", "--model.network=null"]
    main([*test, f"--model.pretrained={tmp_path}/checkpoint", *data, "--out", str(tmp_path)])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["em_in"] > 90, metrics


def test_words_for_people() -> None:
    assert shares_in_words(np.array([1.0, 0.0, 3.0])) == "2 (75%), 0 (25%)"
    assert in_the_text("Born in\nLondon, she wrote.", Answer("London", 0.5, 8, 14)) == "8: Born in [London], she wrote."
    assert in_the_text("Nothing.", Answer("", 1.0, -1, -1)) == "-"
