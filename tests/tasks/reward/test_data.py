"""How texts are cut, what phases learn from, labels, the store of states, and what a datamodule refuses."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from tasks.reward.capabilities import capability_preferences
from tasks.reward.data import GENERATED_COUNTS, GroupSampler, RewardDataModule, limit_pairs, number_prompts
from tasks.reward.examples import generate_pairs, prompt_key
from tasks.reward.texts import (
    LINE,
    StateStore,
    encode_prompts,
    encode_texts,
    fingerprint,
    is_blind_to_lines,
    pad,
    size_of,
    with_speaker,
    without_middle,
)
from tests.helpers.bases import word_pieces
from tests.tasks.reward.builders import SIZES, save_base, save_llama
from zoo.base_models import load_tokenizer
from zoo.errors import DataNotFoundError, UnknownNameError


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {"bert": save_base(folder / "bert"), "llama": save_llama(folder / "llama")}


def datamodule(base, **changes):
    return RewardDataModule(source="generated", base=base, max_length=32, least_prompt=4, **changes)


@pytest.fixture(scope="module")
def data(bases):
    """Generated pairs, ready to be learned."""
    found = datamodule(bases["bert"], aggregate_share=0.4, batch_size=8)
    found.setup(None)
    return found


def words(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(ids)


def test_the_prompt_is_cut_first_and_both_lose_their_middle(bases):
    tokenizer = load_tokenizer(bases["bert"])
    prompt, answer = "user: how do i travel to", "take the train then the bus"
    whole, tight, tighter = (
        encode_texts([prompt], [answer], tokenizer, length, least)[0] for length, least in ((32, 2), (16, 2), (10, 2))
    )
    # Six tokens: 9 * log2(7) = 25.3.
    asked = ["user", ":", *prompt.split()[1:]]
    assert words(tokenizer, whole.ids) == ["[CLS]", "25", *asked, "[SEP]", *answer.split(), "[SEP]"]
    assert whole.types == [0] * 10 + [1] * 7 and whole.cut_prompt == whole.cut_answer == 0
    found = ["[CLS]", "25", "user", ":", "do", "i", "travel", "to", "[SEP]", *answer.split(), "[SEP]"]
    assert words(tokenizer, tight.ids) == found
    assert (tight.cut_prompt, tight.cut_answer) == (1, 0)
    # Two tokens of the prompt stay, and only then is the answer cut.
    found = ["[CLS]", "25", "travel", "to", "[SEP]", "take", "the", "train", "bus", "[SEP]"]
    assert words(tokenizer, tighter.ids) == found and tighter.types == [0] * 5 + [1] * 5
    assert (tighter.cut_prompt, tighter.cut_answer) == (5, 2)
    (alone,) = encode_prompts([prompt], tokenizer, 6)
    assert words(tokenizer, alone.ids) == ["[CLS]", "user", "i", "travel", "to", "[SEP]"]
    with pytest.raises(ValueError, match="no room"):
        encode_texts([prompt], [answer], tokenizer, 8, 4)


def test_a_prompt_that_names_no_speaker_is_the_users(bases):
    tokenizer = load_tokenizer(bases["bert"])
    for prompt, said in (
        ("how do i", "user: how do i"),
        ("Human: how", "Human: how"),
        ("the user: i", "user: the user: i"),
    ):
        assert encode_texts([prompt], ["take"], tokenizer) == encode_texts([said], ["take"], tokenizer)
        assert encode_prompts([prompt], tokenizer) == encode_prompts([said], tokenizer)
        assert (with_speaker(prompt), with_speaker(said)) == (said, said)


def test_sizes_rise_with_the_length_and_end_at_two_digits():
    sizes = [size_of(count) for count in range(5000)]
    assert sizes == sorted(sizes) and sizes[0] == 0 and sizes[-1] == 99
    assert [sizes[2**power - 1] for power in range(12)] == [9 * power for power in range(12)]


def test_a_tokenizer_that_drops_line_ends_reads_a_mark_for_them():
    lines = ["first line", "second line"]
    blind, unmarked = (word_pieces([*lines, *SIZES, *more]) for more in ([LINE], []))
    assert is_blind_to_lines(blind) and not is_blind_to_lines(unmarked)
    for tokenizer, mark in ((blind, [LINE]), (unmarked, [])):
        (text,) = encode_texts(["first"], [" \n first line \n\n second line\n"], tokenizer)
        answer = [token for token, second in zip(text.ids, text.types, strict=True) if second]
        assert words(tokenizer, answer[:-1]) == [*lines[0].split(), *mark, *lines[1].split()]


@pytest.mark.parametrize("room", [0, 1, 5, 9, 10, 20])
def test_what_stays_are_beginning_and_end(room):
    kept = without_middle(list(range(10)), room, 0.75)
    first = round(0.75 * room)
    assert kept == (list(range(10)) if room >= 10 else [*range(first), *range(10 - room + first, 10)])


def test_a_causal_model_reads_prompt_and_answer_in_turn(bases):
    tokenizer = load_tokenizer(bases["llama"])
    (text,) = encode_texts(["user: how do i travel to"], ["take the train"], tokenizer, 32, 2)
    found = words(tokenizer, text.ids)
    assert found[:9] == ["<s>", "18", "user", ":", "how", "do", "i", "travel", "to"]
    assert found[-4:] == ["take", "the", "train", "</s>"]
    assert text.types == [0] * (len(found) - 4) + [1] * 4, "no base reads them, heads' means do"


def test_padding_is_on_the_right(bases):
    tokenizer = load_tokenizer(bases["bert"])
    tokens = encode_texts(["how do i", "how"], ["train", "bus"], tokenizer, 32, 2)
    ids, mask, types = pad(tokens, 9)
    assert mask.sum(1).tolist() == [len(one.ids) for one in tokens]
    assert ids[1, ~mask[1]].tolist() == [9] * 2 and not types[~mask].any()


def test_batches_hold_both_answers_of_each_pair(data):
    dataset = data.train_set
    batch = dataset.collate([5, 2, 9])
    assert len(batch) == 3 and batch.input_ids.shape[0] == 6 and batch.prompt_ids.shape[0] == 3
    for row, place in enumerate(batch.rows):
        pair = dataset.pairs[place]
        for text, answer in ((batch.texts[row], pair.chosen), (batch.texts[row + 3], pair.rejected)):
            (expected,) = encode_texts([pair.prompt], [answer], data.tokenizer, 32, 4)
            assert dataset.texts[text].ids == expected.ids
    assert len({tuple(one.ids) for one in dataset.prompts}) == len({pair.prompt for pair in dataset.pairs})


def test_official_pairs_that_the_test_part_asks_too_are_left_out(bases, monkeypatch, capsys):
    parts = {"train": generate_pairs(60, 3), "test": generate_pairs(20, 4)}
    parts["test"].append(replace(parts["train"][7], id="asked too"))
    asked = {prompt_key(pair.prompt) for pair in parts["test"]}
    count = sum(prompt_key(pair.prompt) in asked for pair in parts["train"])
    monkeypatch.setattr("tasks.reward.data.load_official", lambda source, part: parts[part])
    found = RewardDataModule(source="hh_rlhf", base=bases["bert"]).read_training()
    assert f"{count} training pairs left out: the test part has their prompt." in capsys.readouterr().out
    assert count and len(found["train"]) + len(found["val"]) == 60 - count
    assert not asked & {prompt_key(pair.prompt) for of in found.values() for pair in of}


def test_phases_learn_from_their_own_pairs(data):
    dataset = data.train_set
    count = len(dataset)
    assert count == GENERATED_COUNTS["train"] and dataset.held_back.mean() == pytest.approx(0.4, abs=0.05)
    early, late = set(dataset.places("task")), set(dataset.places("aggregate"))
    assert early | late == set(range(count)) and not early & late
    assert not {dataset.prompt_of[p] for p in early} & {dataset.prompt_of[p] for p in late}
    # What combines experts has to see the task models on pairs that they have not learned from.
    assert set(dataset.places("joint")) == early
    assert all(dataset.places(phase) == list(range(count)) for phase in ("members", "capability", "weigh"))
    first = dataset.places("router")
    assert len(first) == len(dataset.prompts) == len({dataset.prompt_of[place] for place in first})
    numbers = {name: place % 2 for place, name in enumerate(sorted(set(dataset.categories)))}
    model = SimpleNamespace(group_of=numbers)
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(phase="aggregate", model=model))
    batches = [batch.rows for batch in data.train_dataloader()]
    rows = [row for batch in batches for row in batch]
    # But for what is left over, a batch is of one inner model; both are seen all along.
    groups = [{numbers[dataset.categories[row]] for row in batch} for batch in batches]
    assert max(map(len, groups[:-2])) == 1 and groups[:-2] != sorted(groups[:-2], key=min)
    data.trainer = None
    assert sorted(rows) == sorted(late) and rows != sorted(rows)
    everything = [row for batch in data.train_dataloader() for row in batch.rows]
    assert sorted(everything) == list(range(count))


def test_batches_of_one_group_depend_on_seed_and_epoch_alone():
    groups = [n % 3 for n in range(50)]
    sampler, again, other = (GroupSampler(groups, 4, seed) for seed in (0, 0, 1))
    order = list(sampler)
    assert sorted(order) == list(range(50)) and order == list(again) and order != list(other)
    again.set_epoch(1)
    assert list(again) != order
    # 17, 17 and 16 of each group: four whole batches of each, and two that are left.
    assert all(len({groups[place] for place in order[start : start + 4]}) == 1 for start in range(0, 48, 4))


def test_labels_are_properties_what_people_prefer_or_those_of_a_file(bases, tmp_path):
    data = datamodule(bases["bert"], limit=20)
    data.setup("fit")
    data.label(["length", "preference", "no_repetition"])
    for dataset in (data.train_set, data.val_set):
        own = capability_preferences(dataset.pairs, ["length", "no_repetition"])
        assert np.array_equal(dataset.preferences[:, [0, 2]], own)
        # The expert of the preference stays the task model.
        assert not dataset.preferences[:, 1].any()
    assert data.train_set.held_back.any() and not data.val_set.held_back.any()
    assert data.train_set.collate([3]).preferences.dtype == torch.int8
    data.label([])
    assert data.train_set.preferences.shape == (20, 0)
    ids = [pair.id for pair in data.train_set.pairs]
    rows = [
        {"id": id_, "capability": "logic", "preferred": "chosen" if n % 2 else "rejected"}
        for n, id_ in enumerate(ids[:10])
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "labels.csv", index=False)
    data.labels = str(tmp_path / "labels.csv")
    data.label(["preference", "logic"])
    assert data.train_set.preferences[:, 1].tolist() == [-1, 1] * 5 + [0] * 10
    assert not data.val_set.preferences[:, 1].any()
    with pytest.raises(ValueError, match="none may be flipped"):
        datamodule(bases["bert"], flip=0.2, labels="labels.csv")


def test_flipped_labels_are_learned_but_not_scored(bases):
    plain, flipped = datamodule(bases["bert"]), datamodule(bases["bert"], flip=0.4, seed=3)
    for one in (plain, flipped):
        one.setup(None)
    changed = [a.chosen == b.rejected for a, b in zip(plain.train_set.pairs, flipped.train_set.pairs, strict=True)]
    assert sum(changed) == round(0.4 * len(changed))
    assert plain.val_set.pairs == flipped.val_set.pairs and plain.test_set.pairs == flipped.test_set.pairs
    # The texts are the same, so that a store of them serves both.
    assert [t.ids for t in plain.train_set.texts] == [t.ids for t in flipped.train_set.texts]
    assert "40% of their labels made wrong" in flipped.describe(True) and "(synthetic)" in plain.describe(True)
    assert "measurable properties" in plain.describe(True) and "properties" not in plain.describe(False)


def test_a_file_of_ones_own(bases, tmp_path):
    pairs = generate_pairs(60, 4)
    table = pd.DataFrame([{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs])
    table.to_csv(tmp_path / "own.csv", index=False)
    data = RewardDataModule(source="file", file=str(tmp_path / "own.csv"), base=bases["bert"], holdout=0.2)
    data.setup("fit")
    assert len(data.val_set) == 12 and len(data.train_set) == 48 and not data.has_test
    with pytest.raises(DataNotFoundError, match=r"--data\.test_file"):
        data.setup("test")
    leaking = RewardDataModule(
        source="file", file=str(tmp_path / "own.csv"), test_file=str(tmp_path / "own.csv"), base=bases["bert"]
    )
    with pytest.raises(ValueError, match="60 pairs have a prompt that is in another part"):
        leaking.setup("fit")
    with pytest.raises(ValueError, match="nothing to validate on"):
        RewardDataModule(source="file", file=str(tmp_path / "own.csv"), base=bases["bert"], holdout=0.0).setup("fit")
    with pytest.raises(ValueError, match="nothing to score"):
        RewardDataModule(base=bases["bert"]).setup("predict")


def test_arguments_that_do_not_fit(bases):
    with pytest.raises(UnknownNameError, match="preference"):
        RewardDataModule(source="preferences")
    with pytest.raises(ValueError, match="no effect"):
        RewardDataModule(file="own.csv")
    with pytest.raises(ValueError, match="limit=0"):
        RewardDataModule(limit=0)
    with pytest.raises(ValueError, match="go together"):
        RewardDataModule(prompt="user: hi")
    with pytest.raises(DataNotFoundError, match="preference/helpful_train"):
        RewardDataModule(root=str(bases["bert"]), base=bases["bert"]).setup("fit")


def test_a_limit_keeps_prompts_together():
    pairs = generate_pairs(100)
    kept = limit_pairs(pairs, 30)
    assert len(kept) == 30 and [pair for pair in pairs if pair in kept] == kept
    numbers = number_prompts(kept)
    assert np.bincount(numbers).tolist() == [2] * 15


def test_states_are_kept_without_padding_and_found_again(tmp_path):
    hidden = torch.randn(2, 5, 4)
    for folder in (None, tmp_path / "states"):
        store = StateStore(folder)
        assert not store.has("long")
        store.put(["long", "short"], [5, 3], hidden)
        assert store.has("long") and store.has("short") and not store.has("other")
        found = store.get(["short", "long"], [3, 5], 4)
        assert torch.equal(found[0, :3], hidden[1, :3].half().float()) and not found[0, 3:].any()
        assert torch.equal(found[1], hidden[0].half().float())
        with pytest.raises(ValueError, match="are 12 numbers, not 4 x 4: the file is damaged"):
            store.get(["short"], [4], 4)
    again = StateStore(tmp_path / "states")
    assert again.has("long") and torch.equal(again.get(["long"], [5], 4)[0], hidden[0].half().float())
    assert {path.name for path in (tmp_path / "states").rglob("*.*")} == {"long.f16", "short.f16"}
    assert fingerprint("a", [1]) != fingerprint("a", [2])
