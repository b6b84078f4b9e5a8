"""Readers against files written by hand, official rows, splits by prompt, and what is refused."""

import json
import os
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from tasks.reward.examples import (
    GENERATED,
    Candidate,
    Pair,
    check_apart,
    check_pairs,
    flip_labels,
    from_rows,
    generate_pairs,
    load_official,
    prompt_key,
    read_candidates,
    read_pairs,
    read_preference,
    split_by_prompt,
    without_prompts_of,
)
from tasks.reward.groups import HARMLESS, PREFERENCE, merge_categories
from tasks.reward.groups import main as show_groups
from zoo.errors import DataNotFoundError, UnknownNameError

ROWS = [
    {"prompt": "p one", "chosen": "good", "rejected": "bad", "category": "c", "id": "x"},
    {"prompt": "p one", "chosen": "better", "rejected": "bad", "category": "c", "id": "y"},
    {"prompt": "p two", "chosen": 'long, "quoted"\nanswer', "rejected": "short", "category": "d", "id": "z"},
]
PAIRS = [Pair(**row) for row in ROWS]


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl", "json"])
def test_every_format_gives_the_same_pairs(suffix, tmp_path):
    table, path = pd.DataFrame(ROWS), tmp_path / f"pairs.{suffix}"
    if suffix == "parquet":
        table.to_parquet(path)
    elif suffix == "csv":
        table.to_csv(path, index=False)
    else:
        table.to_json(path, orient="records", lines=suffix == "jsonl")
    assert read_pairs(path) == PAIRS


def test_columns_may_be_called_otherwise_and_left_out(tmp_path):
    path = tmp_path / "own.csv"
    pd.DataFrame([{"q": "p", "better": "a", "worse": "b"}]).to_csv(path, index=False)
    names = {"prompt": "q", "chosen": "better", "rejected": "worse"}
    assert read_pairs(path, names) == [Pair("p", "a", "b", "", "1")]
    with pytest.raises(ValueError, match="it lacks prompt, chosen, rejected"):
        read_pairs(path)
    with pytest.raises(UnknownNameError, match="chosen"):
        read_pairs(path, {"chose": "better"})
    # A column that is mapped has to be there, even one that may be left out.
    with pytest.raises(ValueError, match="it lacks kind"):
        read_pairs(path, {**names, "category": "kind"})
    assert read_candidates(path, {"prompt": "q", "answer": "worse"}) == [Candidate("p", "b", "")]


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataNotFoundError, match=r"nothing\.csv"):
        read_pairs(tmp_path / "nothing.csv")
    (tmp_path / "pairs.txt").write_text("")
    with pytest.raises(UnknownNameError, match=r"\.txt"):
        read_pairs(tmp_path / "pairs.txt")
    (tmp_path / "fields.csv").write_text("prompt,answer\nHow do I sleep, please?,Go to bed.\n")
    with pytest.raises(ValueError, match="more fields than the header"):
        read_candidates(tmp_path / "fields.csv")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": ')
    with pytest.raises(ValueError, match=r"not a \.jsonl file"):
        read_pairs(tmp_path / "pairs.jsonl")
    turns = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]
    for suffix in ("jsonl", "parquet"):
        table = pd.DataFrame([{**ROWS[1], "rejected": turns}])
        path = tmp_path / f"turns.{suffix}"
        table.to_parquet(path) if suffix == "parquet" else table.to_json(path, orient="records", lines=True)
        with pytest.raises(ValueError, match=r"row 1 of the column 'rejected' holds a (list|ndarray), .*'role'"):
            read_pairs(path)
    pd.DataFrame([{"prompt": "p", "answer": " "}]).to_csv(tmp_path / "answers.csv", index=False)
    with pytest.raises(ValueError, match="empty in prompt or answer: 1"):
        read_candidates(tmp_path / "answers.csv")


def test_pairs_that_teach_nothing_are_refused_with_all_ids():
    pairs = [*PAIRS, Pair("p", "same", "same", "", "s"), Pair("p", "a", " ", "", "e"), Pair("q", "a", "b", "", "x")]
    with pytest.raises(
        ValueError, match="two equal answers: s; 1 with empty rejected: e; 1 with an id of another pair"
    ):
        check_pairs(pairs, "here")
    with pytest.raises(ValueError, match="no pair"):
        check_pairs([], "here")


def test_a_json_line_may_hold_what_python_takes_for_the_end_of_one(tmp_path):
    pair = {**ROWS[0], "chosen": "one\u2028two\x85three"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair, ensure_ascii=False), "utf-8")
    assert [one.chosen for one in read_pairs(tmp_path / "pairs.jsonl")] == [pair["chosen"]]


def test_development_data_leaves_out_leaks_and_empty_answers_and_space_around_answers(tmp_path):
    spaced = {**ROWS[0], "chosen": " a\n", "rejected": "b"}
    table = [*ROWS, {**ROWS[0], "rejected": ""}, spaced, {**spaced, "rejected": "a "}]
    rows = [
        {**row, "goal": "helpfulness", "id": number, "prompt_has_generation_leak": number == 1}
        for number, row in enumerate(table)
    ]
    pd.DataFrame(rows).astype({"id": str}).to_parquet(tmp_path / "part.parquet")
    pairs = read_preference(tmp_path / "part.parquet")
    assert [pair.id for pair in pairs] == ["helpfulness/0", "helpfulness/2", "helpfulness/4"]
    assert (pairs[2].chosen, pairs[2].rejected) == ("a", "b")


def test_official_rows():
    talk = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"
    rows = [
        {"chosen": f"{talk} Because.", "rejected": f"{talk} No."},
        # Parts before the last turn: no two answers to one prompt.
        {"chosen": f"{talk} A.", "rejected": "\n\nHuman: Ho\n\nAssistant: B."},
        {"chosen": f"{talk} Same.", "rejected": f"{talk} Same."},
    ]
    (pair,) = from_rows(rows, "hh_rlhf", "harmless-base")
    assert pair == Pair(
        talk.removesuffix("\n\nAssistant:").strip(), "Because.", "No.", "harmless-base", "harmless-base-0"
    )
    answers = [{"response": text, "fine-grained_score": score} for text, score in (("x", 2.5), ("y", 4), ("z", 1.0))]
    feedback = [
        {"instruction": "do", "source": "flan", "completions": answers},
        {"instruction": "do", "source": "flan", "completions": answers[:1] * 2},
    ]
    assert from_rows(feedback, "ultrafeedback") == [Pair("do", "y", "z", "flan", "0")]
    bench = [{"prompt": "p", "chosen": "a", "rejected": "b", "subset": "math", "id": 7}]
    assert from_rows(bench, "rewardbench") == [Pair("p", "a", "b", "math", "math-7")]
    with pytest.raises(UnknownNameError, match="hh_rlhf"):
        from_rows([], "hh")
    with pytest.raises(UnknownNameError, match="split of rewardbench"):
        load_official("rewardbench", "train")


def test_official_sources_need_a_network(monkeypatch):
    import datasets

    def fail(name, **_):
        raise ConnectionError(f"no way to {name}")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataNotFoundError, match="Anthropic/hh-rlhf"):
        load_official("hh_rlhf", "train")
    asked = []

    def give(name, data_dir, split):
        asked.append((name, data_dir, split))
        talk = f"\n\nHuman: {data_dir}\n\nAssistant:"
        return [{"chosen": f"{talk} a", "rejected": f"{talk} b"}]

    monkeypatch.setattr(datasets, "load_dataset", give)
    pairs = load_official("hh_rlhf", "test")
    assert [part for _, part, _ in asked] == [pair.category for pair in pairs] and len(pairs) == 4


def test_splits_keep_prompts_together_and_hold_out_of_each_category():
    pairs = generate_pairs(300, 3)
    learned, held = split_by_prompt(pairs, 0.2, seed=1)
    assert sorted(pair.id for pair in [*learned, *held]) == sorted(pair.id for pair in pairs)
    assert not {pair.prompt for pair in learned} & {pair.prompt for pair in held}
    for count in Counter(pair.category for pair in held).values():
        assert count == 20
    assert split_by_prompt(pairs, 0.2, seed=1)[1] == held != split_by_prompt(pairs, 0.2, seed=2)[1]
    assert split_by_prompt(pairs, 0.0)[1] == []
    # The only prompt of a category stays.
    assert split_by_prompt(PAIRS[:2], 0.5)[1] == []
    with pytest.raises(ValueError, match="share=1"):
        split_by_prompt(pairs, 1.0)


def test_a_leak_is_refused_with_the_ids():
    other = [Pair("P  One", "a", "b", "", "leak")]
    with pytest.raises(ValueError, match=r"1 pairs have a prompt .*: x \(train\) and leak \(test\)"):
        check_apart({"train": PAIRS, "test": other})
    check_apart({"train": PAIRS, "test": [Pair("p three", "a", "b", "", "x")]})


def test_flipped_labels():
    pairs = generate_pairs(200)
    flipped = flip_labels(pairs, 0.25, seed=4)
    changed = [(a, b) for a, b in zip(pairs, flipped, strict=True) if a != b]
    assert len(changed) == 50 and all((a.chosen, a.id) == (b.rejected, b.id) for a, b in changed)
    assert flip_labels(pairs, 0.25, seed=4) == flipped and flip_labels(pairs, 0.0) == pairs
    with pytest.raises(ValueError, match=r"flip=1\.5"):
        flip_labels(pairs, 1.5)


def test_generated_pairs_have_the_planted_rule():
    pairs = generate_pairs(120, 5)
    check_pairs(pairs, "generated")
    assert pairs == generate_pairs(120, 5) and len(pairs) == 120
    for pair in pairs:
        _, liked, disliked = GENERATED[pair.category]
        assert set(pair.chosen.split()) & set(liked) and set(pair.rejected.split()) & set(disliked)
    check_apart({"one": pairs, "other": generate_pairs(120, 6)})
    with pytest.raises(UnknownNameError, match="generated category"):
        generate_pairs(3, 0, ["travel"])
    with pytest.raises(ValueError, match="count=0"):
        generate_pairs(0)


# --- groups ----------------------------------------------------------------------------------------------------------


def many(category: str, count: int, words: str) -> list[Pair]:
    return [Pair(f"{words} {category} {number}", "a", "b", category, f"{category}{number}") for number in range(count)]


def test_pairs_with_a_prompt_of_others_are_left_out():
    others = [Pair("P  one ", "x", "y", "c", "o")]
    assert [pair.id for pair in without_prompts_of(PAIRS, others)] == ["z"]


def test_thin_categories_join_those_with_similar_prompts():
    pairs = many("code", 50, "write a python function") + many("poem", 40, "compose verses about love")
    pairs += many("bugs", 5, "fix my python function") + many("song", 4, "compose verses to sing")
    assert merge_categories(pairs, most=4, least=1) == {n: [n] for n in ("code", "poem", "bugs", "song")}
    assert merge_categories(pairs, most=2, least=1) == {"code": ["bugs", "code"], "poem": ["poem", "song"]}
    assert merge_categories(pairs, most=4, least=10) == {"code": ["bugs", "code"], "poem": ["poem", "song"]}
    assert merge_categories(pairs, most=1) == {"code": ["bugs", "code", "poem", "song"]}
    # Another goal is never merged with these, however thin or similar.
    apart = merge_categories(pairs, most=2, least=10, apart=["song"])
    assert apart == {"code": ["bugs", "code", "poem"], "song": ["song"]}
    with pytest.raises(ValueError, match="most=0"):
        merge_categories(pairs, most=0)


def test_the_command_prints_groups_for_a_config(tmp_path, capsys):
    path = tmp_path / "own.csv"
    pairs = many("code", 9, "write a python function") + many("bugs", 5, "fix my python function")
    pd.DataFrame(pairs).rename(columns={"category": "kind"}).to_csv(path, index=False)
    show_groups(["--file", str(path), "--columns", '{"category": "kind"}', "--least", "1"])
    assert 'groups: {"code": ["code"], "bugs": ["bugs"]}' in capsys.readouterr().out
    for words, said in (
        (["--file", str(path), "--most", "0"], "most=0"),
        (["--file", "none.csv"], "none.csv"),
        (["--columns", '{"category": "kind"}'], "name one with --file"),
        (["--columns", '["kind"]'], "a JSON object of names"),
    ):
        with pytest.raises(SystemExit):
            show_groups(words)
        assert said in capsys.readouterr().err


@pytest.mark.skipif("MOE_ZOO_DATA" not in os.environ, reason="needs the development data (MOE_ZOO_DATA)")
def test_the_groups_of_the_config_are_those_of_the_rule():
    import yaml

    parts = {}
    for part, paths in PREFERENCE.items():
        files = [Path(os.environ["MOE_ZOO_DATA"]) / path for path in paths]
        parts[part] = [pair for file in files for pair in read_preference(file)]
    check_apart(parts)
    groups = merge_categories(parts["train"], most=4)
    config = yaml.safe_load(Path("configs/reward/dmoerm-minilm.yaml").read_text())
    assert json.loads(json.dumps(groups)) == config["model"]["init_args"]["network"]["groups"]
    causal = yaml.safe_load(Path("configs/reward/smollm2.yaml").read_text())
    assert causal["model"]["init_args"]["network"]["groups"] == groups
    for categories in groups.values():
        assert len({category in HARMLESS for category in categories}) == 1
    keys = {prompt_key(pair.prompt) for pair in parts["test"]}
    assert len(keys) == len({pair.prompt for pair in parts["test"]})
