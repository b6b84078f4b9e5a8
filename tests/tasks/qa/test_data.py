"""The datamodule: which questions are learned from, validated on, scored and answered, and in which order."""

import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import pytorch_lightning as pl
import torch

from tasks.qa import data as data_module
from tasks.qa.augment import is_copy
from tasks.qa.data import (
    LengthSampler,
    QADataModule,
    WindowDataset,
    check_apart,
    choose_augmentation,
    limit_domains,
)
from tasks.qa.examples import GENERATED, GENERATED_OOD, Example, generate_examples
from tasks.qa.windows import Batch, make_windows
from tests.tasks.qa.builders import word_pieces
from zoo.data import ENVIRONMENT_VARIABLE, EpochSampler
from zoo.errors import DataNotFoundError, UnknownNameError

IN_DOMAIN = [name for name in GENERATED if name not in GENERATED_OOD]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    word_pieces().save_pretrained(folder)
    return str(folder)


def rows(examples: list[Example]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "domain": [e.domain for e in examples],
            "id": [e.id for e in examples],
            "title": [e.document for e in examples],
            "context": [e.context for e in examples],
            "question": [e.question for e in examples],
            "answers": [list(e.answers) for e in examples],
            "answer_starts": [list(e.starts) for e in examples],
        }
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Generated questions in the layout of the development data, under its names of domains."""
    folder = tmp_path_factory.mktemp("root")
    (folder / "qa").mkdir()
    names = dict(zip(GENERATED, ("squad", "policyqa", "subjqa", "race", "duorc"), strict=True))

    def part(count: int, seed: int, domains: list[str]) -> pd.DataFrame:
        made = [replace(e, domain=names[e.domain]) for e in generate_examples(count, seed, domains)]
        return rows(made)

    part(120, 0, IN_DOMAIN).to_parquet(folder / "qa/train.parquet")
    part(40, 1, list(GENERATED_OOD)).to_parquet(folder / "qa/ood_train.parquet")
    part(36, 2, IN_DOMAIN).to_parquet(folder / "qa/test.parquet")
    ood_val = pd.concat([part(20, 3, list(GENERATED_OOD)), part(40, 1, list(GENERATED_OOD)).head(2)])
    ood_val.to_parquet(folder / "qa/ood_val.parquet")
    return str(folder)


def set_up(phase: str | None = "fit", /, **arguments: Any) -> QADataModule:
    module = QADataModule(**arguments)
    module.setup(phase)
    return module


def domains(dataset: WindowDataset) -> Counter[str]:
    return Counter(e.domain for e in dataset.examples)


# --- stages and validation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "fold", "learned", "held_out"),
    [
        ("in_domain", None, {"squad": 36, "policyqa": 36, "subjqa": 36}, {"squad": 4, "policyqa": 4, "subjqa": 4}),
        ("in_domain", 1, {"squad": 36, "policyqa": 36, "subjqa": 36}, {"race": 4, "duorc": 4}),
        (
            "joint",
            None,
            {"squad": 36, "policyqa": 36, "subjqa": 36, "race": 20, "duorc": 20},
            {"squad": 4, "policyqa": 4, "subjqa": 4},
        ),
        ("joint", 0, {"squad": 36, "policyqa": 36, "subjqa": 36, "race": 16, "duorc": 16}, {"race": 4, "duorc": 4}),
        ("ood", None, {"race": 20, "duorc": 20}, {"squad": 4, "policyqa": 4, "subjqa": 4}),
        ("ood", 4, {"race": 16, "duorc": 16}, {"race": 4, "duorc": 4}),
    ],
)
def test_what_is_learned_from_and_validated_on(
    root: str, base: str, stage: str, fold: int | None, learned: dict[str, int], held_out: dict[str, int]
) -> None:
    module = set_up(root=root, base=base, stage=stage, fold=fold)
    assert domains(module.train_set) == learned and domains(module.val_set) == held_out
    for what in ("document", "context", "id"):
        sides = [{getattr(e, what) for e in part.examples} for part in (module.train_set, module.val_set)]
        assert not sides[0] & sides[1]
    other = set_up(root=root, base=base, stage=stage, fold=fold, seed=7)
    assert other.val_set.examples == module.val_set.examples, "what is held out is the same for every seed"
    assert other.train_set.examples == module.train_set.examples


def test_folds_divide_the_out_of_domain_questions(root: str, base: str) -> None:
    held_out = [
        set_up("validate", root=root, base=base, stage="ood", fold=n, folds=4).val_set.examples for n in range(4)
    ]
    ids = [e.id for examples in held_out for e in examples]
    assert len(ids) == len(set(ids)) == 40


def test_only_the_parts_of_a_stage_are_cut(root: str, base: str) -> None:
    fit, validate = set_up(root=root, base=base), set_up("validate", root=root, base=base)
    assert fit.test_set is None and validate.train_set is None
    assert validate.val_set.examples == fit.val_set.examples
    whole = set_up(None, root=root, base=base)
    assert whole.train_set and whole.val_set and whole.test_set


def test_the_test_has_both_kinds_of_domains(root: str, base: str) -> None:
    module = set_up("test", root=root, base=base)
    assert domains(module.test_set) == {"squad": 12, "policyqa": 12, "subjqa": 12, "race": 12, "duorc": 10}
    assert module.train_set is None
    assert {e.domain for e in module.test_set.examples if module.is_ood(e)} == {"race", "duorc"}


def test_windows_belong_to_their_examples(root: str, base: str) -> None:
    module = set_up("test", root=root, base=base, max_length=48, stride=8)
    dataset = module.test_set
    assert len(dataset) == len(dataset.windows) > len(dataset.examples)
    expected = make_windows(dataset.examples, word_pieces(), 48, 8)
    assert dataset.windows == expected and dataset[3] == (3, expected[3])


def test_domains_can_be_chosen(root: str, base: str) -> None:
    module = set_up(root=root, base=base, stage="joint", domains=["squad", "subjqa"], ood_domains=["race"])
    assert domains(module.train_set) == {"squad": 36, "subjqa": 36, "race": 20}
    module.setup("test")
    assert domains(module.test_set) == {"squad": 12, "subjqa": 12, "race": 12}
    assert set(domains(set_up("test", root=root, base=base, ood_domains=["race"]).test_set)) == {
        "squad", "policyqa", "subjqa", "race",
    }  # fmt: skip
    moved = set_up(root=root, base=base, stage="ood", domains=["squad"], ood_domains=["subjqa"], fold=0)
    assert set(domains(moved.train_set)) == {"subjqa"}, "any domain can be the one outside"
    with pytest.raises(UnknownNameError, match="Did you mean 'squad'"):
        set_up(root=root, base=base, domains=["squat", "subjqa"])
    with pytest.raises(UnknownNameError, match="Did you mean 'race'"):
        set_up(root=root, base=base, stage="joint", ood_domains=["rac", "duorc"])
    with pytest.raises(UnknownNameError, match="domain of the test part"):
        set_up("test", root=root, base=base, domains=["none"], ood_domains=[])


def test_limited_domains_keep_questions_from_all_over(root: str, base: str) -> None:
    module = set_up(root=root, base=base, stage="joint", limit=10)
    counts = domains(module.train_set) + domains(module.val_set)
    assert set(counts.values()) == {10}
    examples = generate_examples(300)
    limited = limit_domains(examples, 5)
    places = [examples.index(e) for e in limited]
    assert places == sorted(places) and places[-1] > 200 and set(Counter(e.domain for e in limited).values()) == {5}


def test_a_replay_is_few_questions_of_each_domain_in_domain(root: str, base: str) -> None:
    module = set_up(root=root, base=base, stage="joint", replay=5, seed=3)
    assert domains(module.train_set) == {"squad": 5, "policyqa": 5, "subjqa": 5, "race": 20, "duorc": 20}
    whole = set_up(root=root, base=base, stage="in_domain")
    assert module.val_set.examples == whole.val_set.examples, "the same documents are held out"
    assert {e.id for e in module.train_set.examples if not module.is_ood(e)} < {e.id for e in whole.train_set.examples}
    assert set_up(root=root, base=base, stage="joint", replay=5).train_set.examples == module.train_set.examples


# --- augmentation ----------------------------------------------------------------------------------------------------


def test_only_learned_out_of_domain_questions_are_augmented(root: str, base: str) -> None:
    settings = {"copies": 2, "synonym": 0, "insert": 0, "seed": 3}
    module = set_up(root=root, base=base, stage="joint", fold=0, augment=settings)
    plain = set_up(root=root, base=base, stage="joint", fold=0)
    copies = [e for e in module.train_set.examples if is_copy(e)]
    assert [e for e in module.train_set.examples if not is_copy(e)] == plain.train_set.examples
    assert 50 <= len(copies) <= 64 and {e.domain for e in copies} == {"race", "duorc"}
    held_out = {e.id for e in module.val_set.examples}
    assert not any(e.id.partition("#")[0] in held_out for e in copies)
    assert not any(is_copy(e) for e in module.val_set.examples)
    assert module.val_set.examples == plain.val_set.examples
    assert f"and {len(copies)} augmented ones" in module.describe() and "augmented" not in plain.describe()


def test_synonyms_come_from_where_it_says(root: str, base: str, tmp_path: Path) -> None:
    (tmp_path / "s.txt").write_text("ship\tvessel\nfur\tcoat\n")
    settings = {"copies": 1, "insert": 0, "swap": 0, "delete": 0, "synonyms": str(tmp_path / "s.txt")}
    module = set_up(root=root, base=base, stage="ood", augment=settings)
    copies = [e for e in module.train_set.examples if is_copy(e)]
    assert copies and all("vessel" in e.context or "coat" in e.context for e in copies)


def test_back_translation_is_asked_for_by_models(root: str, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def back_translate(examples: list[Example], pairs: Any) -> list[Example]:
        return [replace(e, id=f"{e.id}#bt1") for e in examples]

    monkeypatch.setattr(data_module, "load_translators", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(data_module, "back_translate", back_translate)
    settings = {"back_translation": [["there", "back"]], "cache": "c.jsonl"}
    module = set_up(root=root, base=base, stage="ood", augment=settings)
    assert asked == [([["there", "back"]], "c.jsonl")]
    assert len(module.train_set.examples) == 80, "back-translation alone brings no EDA"


def test_augmentation_that_makes_no_sense(root: str) -> None:
    with pytest.raises(UnknownNameError, match=r"argument of augment 'copy'.*Did you mean 'copies'"):
        QADataModule(root=root, stage="ood", augment={"copy": 3})
    with pytest.raises(ValueError, match="stage='in_domain' does not learn"):
        QADataModule(root=root, augment={"copies": 3})
    with pytest.raises(ValueError, match=r"cache='x' has no effect without back_translation"):
        choose_augmentation({"cache": "x"})
    assert choose_augmentation({}) == (None, None, None)


# --- order and batches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 160, 1000])
def test_the_order_is_a_permutation_of_batches_of_like_lengths(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 256, (size,), generator=generator).tolist()
    sampler = LengthSampler(lengths, 16, seed=3)
    order = list(sampler)
    assert sorted(order) == list(range(size)) == sorted(sampler) and len(sampler) == size
    assert list(sampler) == order, "the same until the epoch changes"
    sampler.set_epoch(1)
    again = LengthSampler(lengths, 16, seed=3)
    again.set_epoch(1)
    assert list(again) == list(sampler)
    if size == 1000:
        assert list(sampler) != order != list(LengthSampler(lengths, 16, seed=4))

        def padded(order: list[int]) -> int:
            batches = [order[first : first + 16] for first in range(0, size, 16)]
            return sum(len(batch) * max(lengths[place] for place in batch) for batch in batches)

        assert padded(order) < 1.1 * sum(lengths) < 0.7 * padded(list(EpochSampler(size, 3)))
        longest = [max(lengths[place] for place in order[first : first + 16]) for first in range(0, size, 16)]
        assert longest[:-1] != sorted(longest[:-1]), "batches do not go from short to long"


def test_every_epoch_shuffles_the_batches() -> None:
    """One pool of different lengths always has the same batches: only their order is left to vary."""
    sampler = LengthSampler(list(range(160)), 16, seed=3)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    batches = [{tuple(order[first : first + 16]) for first in range(0, 160, 16)} for order in orders]
    assert batches[0] == batches[1] == batches[2] and len({tuple(order) for order in orders}) == 3


def test_batches_are_whole_and_every_window_comes_once(root: str, base: str) -> None:
    module = set_up(root=root, base=base, stage="joint", batch_size=16)
    for loader, dataset in [(module.train_dataloader(), module.train_set), (module.val_dataloader(), module.val_set)]:
        batches = list(loader)
        assert all(isinstance(batch, Batch) for batch in batches) and len(batches) == len(loader)
        assert [len(batch) for batch in batches[:-1]] == [16] * (len(batches) - 1)
        assert sorted(place for batch in batches for place in batch.windows) == list(range(len(dataset)))
        for batch in batches:
            for row, place in enumerate(batch.windows):
                ids = dataset.windows[place].input_ids
                assert batch.input_ids[row, : len(ids)].tolist() == ids
                assert (batch.input_ids[row, len(ids) :] == module.tokenizer.pad_token_id).all()
    module = set_up("test", root=root, base=base, batch_size=4)
    lengths = [batch.input_ids.shape[1] for batch in module.test_dataloader()]
    assert lengths == sorted(lengths, reverse=True) != sorted(lengths)


class Recorder(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []
        self.predicted: list[int] = []

    def training_step(self, batch: Batch, _: int) -> torch.Tensor:
        self.seen.append(batch.windows)
        return self.weight * batch.input_ids.float().mean()

    def validation_step(self, batch: Batch, _: int) -> None:
        self.log("length", float(batch.input_ids.shape[1]), batch_size=len(batch))

    def predict_step(self, batch: Batch, _: int) -> int:
        self.predicted += batch.windows
        return len(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(module: QADataModule, epochs: int, folder: Path, **options: Any) -> Recorder:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = pl.Trainer(max_epochs=epochs, accelerator="cpu", default_root_dir=folder, num_sanity_val_steps=0, **quiet)
    recorder = Recorder()
    trainer.fit(recorder, module, **options)
    trainer.save_checkpoint(folder / "last.ckpt")
    return recorder


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*number of training batches")
@pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists")
def test_a_resumed_run_sees_the_order_of_an_uninterrupted_one(root: str, base: str, tmp_path: Path) -> None:
    arguments = {"root": root, "base": base, "stage": "joint", "seed": 5}
    whole = run(QADataModule(**arguments), 3, tmp_path)
    first = run(QADataModule(**arguments), 1, tmp_path)
    rest = run(QADataModule(**arguments), 3, tmp_path, ckpt_path=tmp_path / "last.ckpt", weights_only=False)
    assert first.seen + rest.seen == whole.seen
    epoch = len(first.seen)
    assert whole.seen[:epoch] != whole.seen[epoch : 2 * epoch]


# --- the other sources -----------------------------------------------------------------------------------------------


def test_the_generated_source_needs_no_files(base: str) -> None:
    module = set_up(None, source="generated", base=base, stage="joint", limit=40)
    assert set(domains(module.train_set)) == set(GENERATED) == set(domains(module.test_set))
    assert set(domains(module.val_set)) == set(IN_DOMAIN) and module.ood_domains == GENERATED_OOD
    learned = {e.context for e in module.train_set.examples}
    assert not learned & {e.context for e in module.test_set.examples}
    assert "(synthetic)" in module.describe()


def test_a_file_of_ones_own(base: str, tmp_path: Path) -> None:
    examples = [replace(e, domain="mine" if n % 4 else "new") for n, e in enumerate(generate_examples(80))]
    rows(examples).to_parquet(tmp_path / "train.parquet")
    rows(generate_examples(10, seed=9)).to_parquet(tmp_path / "test.parquet")
    own = {"source": "file", "file": str(tmp_path / "train.parquet"), "base": base}
    module = set_up(**own)
    assert set(domains(module.train_set)) == {"mine", "new"} and module.ood_domains == ()
    assert "test questions" not in module.describe()
    with pytest.raises(DataNotFoundError, match=r"the questions of test.*--data\.test_file"):
        module.setup("test")
    assert len(set_up("test", **own, test_file=str(tmp_path / "test.parquet")).test_set.examples) == 10
    assert set_up(None, **own).test_set is None
    few = set_up(**own, stage="ood", ood_domains=["new"], fold=0, folds=3)
    assert set(domains(few.train_set)) == set(domains(few.val_set)) == {"new"}
    with pytest.raises(DataNotFoundError, match=r"the questions of train.*--data\.file"):
        set_up(source="file", base=base)


@pytest.mark.parametrize(
    ("source", "splits", "ood"),
    [
        ("squad", {"train": ["train"], "test": ["validation"]}, ()),
        ("mrqa", {"train": ["train"], "test": ["validation", "test"]}, ("RACE",)),
    ],
)
def test_official_splits(
    base: str, monkeypatch: pytest.MonkeyPatch, source: str, splits: dict[str, list[str]], ood: tuple[str, ...]
) -> None:
    asked: list[str] = []

    def load(name: str, split: str) -> list[Example]:
        asked.append(split)
        domain = {"test": "RACE"}.get(split, "SQuAD")
        return [replace(e, id=f"{split}{e.id}", domain=domain) for e in generate_examples(20)]

    monkeypatch.setattr(data_module, "load_official", load)
    module = set_up("fit", source=source, base=base)
    module.setup("test")
    # Fitting counts what the test repeats of it.
    assert asked == [*splits["train"], *splits["test"], *splits["test"]]
    assert set(domains(module.train_set)) == {"SQuAD"}
    assert {e.domain for e in module.test_set.examples if module.is_ood(e)} == set(ood)


# --- prediction ------------------------------------------------------------------------------------------------------


def test_a_question_and_its_text(base: str, tmp_path: Path) -> None:
    text = "Rollo came from Norway. " * 30
    (tmp_path / "t.txt").write_text(text, encoding="utf-8-sig")
    from_file = set_up(
        "predict", base=base, question="Who?", context_file=str(tmp_path / "t.txt"), max_length=64, stride=16
    )
    given = set_up("predict", base=base, question="Who?", context=text, max_length=64, stride=16)
    assert from_file.predict_set.examples == given.predict_set.examples
    (example,) = given.predict_set.examples
    assert (example.question, example.context, example.answers) == ("Who?", text, ()) and len(given.predict_set) > 2
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    recorder = Recorder()
    trainer.predict(recorder, given)
    assert sorted(recorder.predicted) == list(range(len(given.predict_set)))


def test_a_file_of_questions_without_answers(base: str, tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text("question,context\nWho?,Rollo came.\nWhere?,To France.\n")
    module = set_up("predict", base=base, source="file", file=str(tmp_path / "q.csv"))
    assert [e.question for e in module.predict_set.examples] == ["Who?", "Where?"]


def test_questions_that_cannot_be_asked(base: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is nothing to predict: name a question"):
        set_up("predict", base=base)
    with pytest.raises(
        ValueError, match=r"takes a context or a context_file, one of them; found question='Who.' and nei"
    ):
        QADataModule(question="Who?")
    with pytest.raises(ValueError, match="found question=None and context"):
        QADataModule(context="Rollo came.")
    with pytest.raises(ValueError, match="found question='a' and context and context_file"):
        QADataModule(question="a", context="b", context_file="c")
    with pytest.raises(ValueError, match="1 with empty context"):
        set_up("predict", base=base, question="Who?", context=" ")
    (tmp_path / "t.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="is not UTF-8: byte 0xe9"):
        set_up("predict", base=base, question="Who?", context_file=str(tmp_path / "t.txt"))


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "squads"}, "Did you mean 'squad'"),
        ({"stage": "in-domain"}, "Did you mean 'in_domain'"),
        ({"file": "x.csv"}, "file='x.csv' has no effect on source='robustqa': it is for source='file'"),
        ({"test_file": "x.csv", "source": "squad"}, "test_file='x.csv' has no effect"),
        ({"fold": 5}, "fold=5: must be from 0 to 4, as folds=5"),
        ({"limit": 0}, "limit=0"),
        ({"stage": "joint", "replay": 0}, "replay=0 with stage='joint': a joint stage learns from at least 1"),
        ({"stage": "ood", "replay": 5}, "replay=5 with stage='ood'.*another stage has no replay"),
    ],
)
def test_arguments_without_effect(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QADataModule(**arguments)


def test_parts_that_are_missing(root: str, base: str, tmp_path: Path) -> None:
    with pytest.raises(DataNotFoundError, match=r"qa/train\.parquet.*source=generated needs none"):
        set_up(root=str(tmp_path), base=base)
    rows(generate_examples(20)).to_parquet(tmp_path / "q.parquet")
    own = {"source": "file", "file": str(tmp_path / "q.parquet"), "base": base, "ood_domains": list(GENERATED)}
    with pytest.raises(
        ValueError, match="has nothing to learn from: the training part of source='file' has 0 in-domain"
    ):
        set_up(**own, stage="joint")
    with pytest.raises(ValueError, match="nothing to validate on: without in-domain questions choose a fold"):
        set_up(**own, stage="ood")
    for wrong in ({"stage": "ood"}, {"fold": 0}):
        with pytest.raises(ValueError, match="need out-of-domain questions, but source='squad' has none"):
            set_up(source="squad", base=base, **wrong)
    tested = {"source": "file", "test_file": str(tmp_path / "q.parquet"), "stage": "ood", "fold": 0}
    assert set_up("test", base=base, **tested).test_set, "a training config scores other files too"
    with pytest.raises(DataNotFoundError, match="the base model"):
        set_up("predict", base=str(tmp_path / "none"), question="a", context="b")


def test_a_wrong_test_file_is_said_before_training(base: str, tmp_path: Path) -> None:
    rows(generate_examples(40)).to_parquet(tmp_path / "q.parquet")
    own = {"source": "file", "file": str(tmp_path / "q.parquet"), "base": base}
    with pytest.raises(DataNotFoundError, match=r"the questions\. Looked in: .*typo\.parquet"):
        set_up(**own, test_file=str(tmp_path / "typo.parquet"))
    (tmp_path / "t.csv").write_text("question,context\nWhat?,That.\n")
    with pytest.raises(ValueError, match=r"t\.csv has no column answer"):
        set_up(**own, test_file=str(tmp_path / "t.csv"))


def test_training_can_do_without_a_test_part_that_is_not_the_user_s(root: str, base: str, tmp_path: Path) -> None:
    (tmp_path / "qa").mkdir()
    for name in ("train.parquet", "ood_train.parquet"):
        shutil.copy(Path(root) / "qa" / name, tmp_path / "qa")
    module = set_up(root=str(tmp_path), base=base)
    assert module.seen is None and "test questions" not in module.describe()
    with pytest.raises(DataNotFoundError, match=r"qa/test\.parquet"):
        module.setup("test")


def test_a_context_on_both_sides_is_refused(base: str, tmp_path: Path) -> None:
    """Documents tell apart what is really the same text."""
    examples = [replace(e, document=str(n), domain="mine") for n, e in enumerate(generate_examples(60))]
    rows(examples).to_parquet(tmp_path / "q.parquet")
    with pytest.raises(
        ValueError, match=r"'train \(contexts\)' and 'validation \(contexts\)' share \d+ samples, e.g. syn"
    ):
        set_up(source="file", file=str(tmp_path / "q.parquet"), base=base)
    one, other = generate_examples(2)
    with pytest.raises(ValueError, match=r"'train \(documents\)'"):
        check_apart([one], [replace(other, document=one.document, context="else")])


# --- words -----------------------------------------------------------------------------------------------------------


def test_the_description_counts(root: str, base: str) -> None:
    module = set_up(root=root, base=base, stage="joint", max_length=48, stride=8, keep_empty=0.5)
    text, windows = module.describe(), module.train_set.windows
    assert text.startswith("148 questions of squad, policyqa, subjqa, race, duorc, in ")
    assert f"in {len(windows)} windows of up to 48 tokens, {sum(not w.end for w in windows)} of them without" in text
    assert "settings chosen on 12 questions of squad, subjqa, policyqa" in text
    assert text.endswith("; 2 test questions are about a context learned from")
    more = set_up(root=root, base=base, stage="joint", max_length=48, stride=8)
    assert len(more.train_set) > len(windows) and len(more.val_set) == len(module.val_set), "validation keeps all"
    none = set_up(root=root, base=base, stage="joint", max_length=48, stride=8, keep_empty=0.0)
    assert all(window.end for window in none.train_set.windows)


@pytest.mark.skipif(not os.environ.get(ENVIRONMENT_VARIABLE), reason=f"{ENVIRONMENT_VARIABLE} names no data folder")
def test_the_development_data(base: str) -> None:
    module = set_up(base=base, stage="ood", fold=2, limit=60)
    assert set(domains(module.val_set)) == {"race", "duorc", "relation_extraction"} == set(domains(module.train_set))
    module = set_up("fit", base=base, limit=20)
    assert len(domains(module.train_set)) == 7 == len(domains(module.val_set))
