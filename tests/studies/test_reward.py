"""The harness of studies/reward on generated pairs: rows once, paired differences, a policy and a checkpoint."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import zoo
from studies.reward import policy, properties, study
from studies.reward.methods import (
    BASELINES,
    CAPABILITIES,
    FLIPPED,
    GROUPS,
    MAIN,
    METHODS,
    OWN_CAPABILITIES,
    PAIRS,
    PROXIES,
    READINGS,
    SHOWN,
    SIX_GROUPS,
    TRIALS,
)
from studies.reward.properties import drop_least, regress
from studies.reward.study import Run
from tasks.reward.capabilities import CAPABILITIES as KNOWN
from tasks.reward.capabilities import PREFERENCE_ITSELF
from tasks.reward.evaluate import Report
from tasks.reward.examples import read_preference
from tasks.reward.groups import PREFERENCE, merge_categories
from tasks.reward.task import RewardTask, astray
from tests.tasks.reward.builders import EACH, save_base, save_causal
from zoo import hub
from zoo.errors import DataNotFoundError, UnknownNameError

# As they are run, before they are made small.
WHOLE = dict(METHODS)
CHOSEN = ("dmoerm", "single", "ensemble", "properties", "judge", "gold", "layers-2")
SEEDS = (0, 1)


def smaller(name):
    """A method for generated pairs on the tiny base."""
    method = METHODS[name]
    network = {key: value for key, value in method.network.items() if not key.endswith("rank")}
    if len(network.get("groups", [])) > 1:
        network["groups"] = EACH
    if len(network.get("groups", [])) > 1 and "capabilities" in network:
        network |= {"capabilities": ["preference", "length"], "general_rank": 2}
    epochs = dict.fromkeys(method.epochs, 1)
    data = {**method.data} | ({"learn": 20} if "learn" in method.data else {})
    return replace(method, network=network, epochs=epochs, data=data)


@pytest.fixture(scope="module", autouse=True)
def methods():
    """Methods as small as the data."""
    with pytest.MonkeyPatch.context() as patch:
        for name in CHOSEN:
            patch.setitem(METHODS, name, smaller(name))
        yield


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders with a tiny BERT and a tiny causal model."""
    folder = tmp_path_factory.mktemp("bases")
    return save_base(folder / "bert"), save_causal(folder / "causal")


@pytest.fixture(scope="module")
def arguments(bases, tmp_path_factory):
    """The command line in a folder, that of the results by default."""
    path = tmp_path_factory.mktemp("reward")

    def compose(*more, folder=path):
        options = ["--source", "generated", "--base", bases[0], "--judge", bases[1], "--limit", "40"]
        options += ["--sample", "10", "--gold-limit", "20", "--folder", str(folder)]
        return [*options, "--seeds", *map(str, SEEDS), "--methods", *CHOSEN, *more]

    return compose


@pytest.fixture(scope="module")
def folder(arguments):
    """Results of two seeds, of validation too, and a checkpoint."""
    study.main(arguments())
    study.main(arguments("--part", "val", "--methods", "single", "--seeds", "0"))
    options = study.parse(arguments())
    released = ["--release", "dmoerm", "--seed", "1", "--commit", "c0ffee", "--out", str(options.folder / "released")]
    study.main(arguments(*released))
    return options.folder


def row(folder, name):
    return json.loads((folder / "results" / f"generated.{name}.json").read_text())


def consistency(folder, method, name="", places=None):
    """By hand, the mean over seeds."""
    values = []
    for seed in SEEDS:
        path = folder / "results" / f"generated.{method}.seed{seed}.json"
        if path.exists():
            found = json.loads(path.read_text())
            differences = study.numbers(found["differences"][name])
            kept = (
                np.ones(len(differences), bool) if places is None else np.isin(study.numbers(found["places"]), places)
            )
            values.append(100 * np.mean((differences > 0) + 0.5 * (differences == 0), where=kept))
    return np.mean(values)


def test_each_run_has_one_row(folder):
    names = {path.name.removeprefix("generated.") for path in (folder / "results").iterdir()}
    seeds = {f"{method}.seed{seed}.json" for method in CHOSEN for seed in SEEDS} - {
        "judge.seed1.json",
        "properties.seed1.json",
    }
    assert names == seeds | {"single.seed0.val.json"}
    first = row(folder, "dmoerm.seed0")
    assert set(first["differences"]) == {"", "oracle", "random", "task", "general"} and first["groups"] == list(EACH)
    known = {"preference", "length", "general"}
    assert set(first["experts"]) == set(EACH) and set(first["experts"]["synthetic_speed"]) == known
    assert set(row(folder, "ensemble.seed0")["differences"]) == {"", "worst", "uncertainty"}
    assert first["parameters_trained"] > row(folder, "single.seed0")["parameters_trained"] > 0
    assert (first["pairs"], row(folder, "judge.seed0")["pairs"], row(folder, "gold.seed0")["pairs"]) == (40, 10, 20)
    assert "words" not in json.dumps(first["category"]) and "how do i" not in json.dumps(first)


def test_the_gold_reward_learns_what_no_other_model_does(arguments):
    options = study.parse(arguments())
    gold, other = (study.make_data(options, Run(name, 0)) for name in ("gold", "dmoerm"))
    for data in (gold, other):
        data.setup("fit")
    other.setup("test")
    learned = {pair.prompt for pair in gold.train_set.pairs}
    assert learned == {pair.prompt for of in (other.val_set, other.test_set) for pair in of.pairs}
    assert not learned & {pair.prompt for pair in other.train_set.pairs}
    assert {p.id for p in study.scored(options, Run("gold", 0), gold).pairs} <= {p.id for p in other.train_set.pairs}


def test_trials_see_no_test_pair_and_learn_from_fewer(arguments):
    options = study.parse(arguments("--part", "val"))
    trial, other = (study.make_data(options, Run("single", 0, part)) for part in ("val", "test"))
    for data in (trial, other):
        data.setup("fit")
    learned, validated = ({p.id for p in of.pairs} for of in (trial.train_set, trial.val_set))
    assert learned | validated == {p.id for of in (other.train_set, other.val_set) for p in of.pairs}
    assert 0 < len(other.train_set) - len(learned) < 0.3 * len(other.train_set)
    assert len(study.scored(options, Run("single", 0, "val"), trial)) == len(validated)
    assert study.parse(["--part", "val"]).methods == [name for trials in TRIALS.values() for name in trials]
    assert study.parse([]).methods == list(MAIN)


def test_tables(folder):
    found = json.loads((folder / "results.json").read_text())
    assert found["part"] == "test"
    lines = {line["method"]: line for line in found["all"]}
    assert set(lines) == {
        "dmoerm", "dmoerm/oracle", "dmoerm/random", "dmoerm/task", "dmoerm/general", "properties", "single",
        "ensemble", "ensemble/worst", "ensemble/uncertainty", "longer",
    }  # fmt: skip
    for name, line in lines.items():
        method, _, reading = name.partition("/")
        if method != "longer":
            assert line["consistency"] == pytest.approx(consistency(folder, method, reading)), name
    routed = [row(folder, f"dmoerm.seed{seed}") for seed in SEEDS]
    shares = [100 * np.mean(study.numbers(one["wanted"]) == study.numbers(one["routes"])) for one in routed]
    # Two pairs of each prompt.
    assert lines["dmoerm"]["router_acc"] == pytest.approx(np.mean(shares))
    first, sent = routed[0], found["routes"]["dmoerm"]
    # Of a category, pairs are counted by prompt and route.
    for number, name in enumerate(first["categories"]):
        own = study.numbers(first["category"]) == number
        pairs = {*zip(study.numbers(first["prompts"])[own], study.numbers(first["routes"])[own], strict=True)}
        counted = [sum(route == place for _, route in pairs) for place in range(len(first["groups"]))]
        assert sent["prompts"][name] == counted, name
    places = study.numbers(row(folder, "judge.seed0")["places"])
    sampled = {line["method"]: line for line in found["sample"]}
    for name in ("judge", "layers-2", "single"):
        assert sampled[name]["consistency"] == pytest.approx(consistency(folder, name, places=places)), name
    between = {(line["compared"], line["metric"]): line for line in found["differences"]}
    line = between["dmoerm - single", "consistency"]
    assert line["mean"] == pytest.approx(consistency(folder, "dmoerm") - consistency(folder, "single"))
    assert line["low"] <= line["mean"] <= line["high"]
    assert ("dmoerm - judge", "consistency") in {
        (line["compared"], line["metric"]) for line in found["sample differences"]
    }
    assert (folder / "consistency.png").is_file()
    told = [study.numbers(row(folder, f"gold.seed{seed}")["differences"]["oracle"]) for seed in SEEDS]
    assert found["gold"]["agreement"] == pytest.approx(100 * np.mean(np.mean(told, axis=0) > 0))
    assert [line["method"] for line in json.loads((folder / "val.json").read_text())["all"]] == ["single", "longer"]


def test_methods_are_compared_on_the_seeds_that_both_have():
    random = np.random.default_rng(0)
    rewards = {"dmoerm": random.normal(size=(2, 12)), "single": random.normal(size=(3, 12))}
    rewards |= {"gate": random.normal(size=(1, 12)), "properties": random.normal(size=(1, 12))}
    seeds = {"dmoerm": [0, 2], "single": [0, 1, 2], "gate": [1], "properties": [0]}
    rows = {name: [{"seed": seed} for seed in of] for name, of in seeds.items()}
    report = Report.of(["Code"] * 12, list(range(12)), random.normal(size=12), rewards)
    found = {(line["compared"], line["metric"]): line for line in study.differences(rows, report)}
    right = {name: 100 * (of > 0).mean(axis=1) for name, of in rewards.items()}
    line = found["dmoerm - single", "consistency"]
    assert line["seeds"] == 2
    assert line["mean"] == pytest.approx(right["dmoerm"].mean() - right["single"][[0, 2]].mean())
    # What is not drawn at random has one row for all seeds.
    line = found["dmoerm - properties", "consistency"]
    assert line["mean"] == pytest.approx(right["dmoerm"].mean() - right["properties"].mean())
    assert ("dmoerm - gate", "consistency") not in found


def test_scores_are_those_of_the_saved_network(folder, arguments):
    options = study.parse(arguments())
    one = Run("dmoerm", 0)
    task = RewardTask(pretrained=str(study.checkpoint(options, one)))
    dataset = study.scored(options, one, study.make_data(options, one))
    task.model.eval()
    again = study.score(task, dataset, range(len(dataset)))
    for name, values in row(folder, "dmoerm.seed0")["differences"].items():
        # There the states of the prefix were rounded.
        np.testing.assert_allclose(study.numbers(again["differences"][name]), study.numbers(values), atol=2e-2)


def test_the_readings_of_parts_of_it_and_of_a_random_route_are_theirs(folder, arguments):
    options, one = study.parse(arguments()), Run("dmoerm", 0)
    model = study.load_network(options, one).eval()
    data = study.make_data(options, one)
    dataset = study.scored(options, one, data)
    task = RewardTask(pretrained=str(study.checkpoint(options, one)))
    inputs = task.inputs(model, dataset.collate(list(range(len(dataset)))), dataset)
    batch = dataset.collate(list(range(len(dataset))))
    with torch.no_grad():
        drawn = model.read(astray(model, inputs, batch), oracle=True).reward
        route = model.read(inputs).route
        rewards = torch.stack([inner.task_rewards(inputs.streams) for inner in model.inner], dim=1)
        general = model.general_scores(inputs.streams)[:, 0]
    own = rewards.gather(1, route[:, None])[:, 0]
    for name, found in (("random", drawn), ("task", own), ("general", general)):
        values = study.numbers(row(folder, "dmoerm.seed0")["differences"][name])
        np.testing.assert_allclose((found[: len(dataset)] - found[len(dataset) :]).numpy(), values, atol=2e-2)


def test_a_regression_finds_what_a_group_goes_by():
    pairs = []
    for number in range(80):
        category, more = ("a", "long") if number % 2 else ("b", "short")
        texts = {"long": f"{'word ' * (10 + number)}end", "short": f"word {number}"}
        other = {"long": "short", "short": "long"}[more]
        pairs.append(study.Pair(f"user: {number}", texts[more], texts[other], category, str(number)))
    together = regress(pairs[:60], pairs[60:], {})
    assert (regress(pairs[:60], pairs[60:], {"a": 0, "b": 1}) > 0).all() and not (together > 0).all()
    assert not regress(pairs[:60], [replace(pairs[60], rejected=pairs[60].chosen)], {}).any()


def test_the_property_that_is_missed_least_is_left_out_first():
    random, pairs = np.random.default_rng(0), []
    for number in range(200):
        # The chosen answer is mostly the longer one; whether it says sorry is drawn.
        words = [30, 10] if random.random() < 0.9 else [10, 30]
        chosen, rejected = (f"{'word ' * count}{random.choice(['sorry', 'end'])}" for count in words)
        pairs.append(study.Pair(f"user: {number}", chosen, rejected, "a", str(number)))
    lines = drop_least(pairs, ["refusal", "length"], {"a": 0}, 1)
    assert [line["left out"] for line in lines] == ["nothing", "refusal"]
    assert lines[1]["loss"] == pytest.approx(lines[0]["loss"], abs=0.02) and lines[1]["loss"] < 0.5 < np.log(2)


def test_as_many_properties_are_kept_as_the_study_has(capsys):
    kept = properties.main(["--source", "generated"])
    assert set(kept) < {*KNOWN} - {"length"} and len(kept) == len(set(CAPABILITIES) - {PREFERENCE_ITSELF})
    assert capsys.readouterr().out.count("nothing") == 1


def test_rows_tell_defaults_too(folder):
    found = row(folder, "dmoerm.seed0")["setting"]
    assert found["network"]["router_dim"] == 32 and found["data"]["max_length"] == 256 and found["task"]["lr"]
    assert "source" not in found["data"] and "seed" not in found["data"]


def test_a_second_call_runs_nothing(folder, arguments, monkeypatch):
    monkeypatch.setattr(study, "run", None)
    study.main(arguments())
    study.main(arguments("--only", "table"))


def test_a_row_of_another_setting_is_refused(folder, arguments, monkeypatch):
    with pytest.raises(ValueError, match="limit=40"):
        study.main(arguments("--limit", "41"))
    monkeypatch.setitem(METHODS, "single", replace(METHODS["single"], task={"lr": 1.0}))
    with pytest.raises(ValueError, match="has setting="):
        study.main(arguments("--only", "table"))


def test_the_release_holds_what_was_trained_and_what_others_scored(folder, arguments):
    hub.verify(folder / "released")
    card = hub.info(folder / "released").card
    (recorded,) = card.results
    seeds = " ".join(map(str, study.parse(arguments()).seeds))
    command = f"python -m studies.reward.study --seeds {seeds} --methods dmoerm single ensemble"
    assert (recorded.commit, recorded.command) == ("c0ffee", command)
    assert recorded.metrics["single/consistency"] == pytest.approx(consistency(folder, "single"))
    assert not any(name.startswith(("dmoerm/consistency", "longer", "properties")) for name in recorded.metrics)
    assert not any("encoder" in name for name in zoo.load(folder / "released").state_dict())


def test_what_is_missing_is_said(arguments, tmp_path):
    with pytest.raises(DataNotFoundError, match="without --only table"):
        study.main(arguments("--only", "table", folder=tmp_path))
    release = ["--release", "single", "--seed", "0", "--commit", "c0ffee", "--out", str(tmp_path)]
    with pytest.raises(DataNotFoundError, match="--methods single --seeds 0"):
        study.main(arguments(*release, folder=tmp_path))
    with pytest.raises(UnknownNameError, match="'dmoerm'"):
        study.main(["--methods", "dmoer"])
    for words in (["--source", "generated"], ["--release", "single", "--seed", "0"], ["--out", str(tmp_path)]):
        with pytest.raises(SystemExit):
            study.main(words)


def test_how_often_a_refusal_is_preferred():
    refusal, answer = "I'm sorry, but I cannot help with that.", "Boil it for seven minutes."
    texts = [(answer, refusal, "Chat"), (refusal, answer, "Chat"), (answer, answer, "Chat"), (answer, refusal, "Code")]
    texts.append((refusal, answer, "Harmlessness"))
    pairs = [
        study.Pair("user: egg?", chosen, rejected, kind, str(n)) for n, (chosen, rejected, kind) in enumerate(texts)
    ]
    differences = {"dmoerm": np.array([[1, 1, 1, 1, 1], [-1, 1, 1, 1, -1]])}
    found = {line["model"]: (line["pairs"], line["percent"]) for line in study.refusals(differences, pairs)}
    # Of the first, second and fourth pair; the second seed prefers the refusal in the first two.
    assert found == {"people": (3, pytest.approx(100 / 3)), "dmoerm": (3, pytest.approx(50))}
    assert study.refusals(differences, pairs[2:3]) == []


def test_methods_fit_each_other():
    parts = {f"dmoerm/{name}" for name in ("oracle", "random", "task", "general")}
    readings = {"longer", *parts, "ensemble/worst", "ensemble/uncertainty"}
    assert {name for pair in PAIRS for name in pair} | set(SHOWN) <= METHODS.keys() | readings
    assert set(MAIN) | {name.partition("/")[0] for name in PROXIES} <= METHODS.keys()
    assert {*BASELINES, *FLIPPED} <= METHODS.keys()
    # All methods that learn from people are tried equally often, and have one of the settings that were.
    assert set(TRIALS) == {"dmoerm", *BASELINES} and len({len(of) for of in TRIALS.values()}) == 1
    for name, trials in TRIALS.items():
        assert trials.keys() <= METHODS.keys()
        assert WHOLE[name] in [replace(of, what=WHOLE[name].what) for of in trials.values()]
    assert set(CAPABILITIES) <= {*KNOWN, PREFERENCE_ITSELF} - {"length"}
    assert {name for names in OWN_CAPABILITIES.values() for name in names} <= set(CAPABILITIES)
    assert OWN_CAPABILITIES.keys() == GROUPS.keys()
    flipped = METHODS["dmoerm-flip40"]
    assert {**flipped.data, "flip": 0.0} == {**METHODS["dmoerm"].data, "flip": 0.0} and flipped.data["flip"] == 0.4


def test_the_shipped_configs_are_those_of_the_study():
    for stem, name in (("dmoerm-minilm", "dmoerm"), ("single", "single-equal")):
        written = yaml.safe_load(Path(f"configs/reward/{stem}.yaml").read_text())
        model, data, method = written["model"]["init_args"], written["data"]["init_args"], WHOLE[name]
        assert model["network"] == method.network and model["epochs"] == method.epochs
        assert model.get("phase_lr", {}) == method.task.get("phase_lr", {})
        assert data["aggregate_share"] == method.data["aggregate_share"]


def size(dim=384, hidden=1536, name="dmoerm"):
    """Parameters of a method that learn, on a base as wide as MiniLM."""
    network = WHOLE[name].network
    per_rank = 4 * (dim + dim) + 2 * (dim + hidden)

    def lora(rank):
        # A head reads the last state and two means.
        return rank * per_rank + 3 * dim

    if name == "ensemble":
        return network["members"] * lora(network["rank"])
    if name == "objectives":
        return lora(network["rank"]) + len(network["capabilities"]) * 3 * dim
    groups, capabilities = len(network["groups"]), network.get("capabilities", [])
    names = capabilities if isinstance(capabilities, list) else next(iter(capabilities.values()))
    experts = len([name for name in names if name != PREFERENCE_ITSELF])
    known = experts * lora(network.get("capability_rank", 8))
    # Each score has a weight of the phase `weigh` and one of the aggregation.
    general = network.get("general_rank", 0)
    # And the general expert a scale.
    once = network.get("general_members", 1) * lora(general) + 1 if general else 0
    inner = lora(network.get("task_rank", 16)) + 2 * len(names)
    router = 4 * dim * 32 + 32 + 32 * groups if groups > 1 else 0
    return groups * inner + (1 if network.get("share_capabilities") else groups) * known + once + router


@pytest.mark.parametrize(
    "name",
    ["single-equal", "objectives", "ensemble", "one-group", "no-general", "one-member", "own-experts", "joint"],
)
def test_baselines_of_equal_size_have_as_many_parameters(name):
    assert size(name=name) == pytest.approx(size(), rel=0.02)


@pytest.mark.skipif("MOE_ZOO_DATA" not in os.environ, reason="needs the development data (MOE_ZOO_DATA)")
def test_groups_are_those_of_the_rule():
    pairs = [p for path in PREFERENCE["train"] for p in read_preference(Path(os.environ["MOE_ZOO_DATA"]) / path)]
    assert merge_categories(pairs, most=4) == GROUPS and merge_categories(pairs) == SIX_GROUPS


def test_what_is_slow_is_scored_on_one_pair_of_each_prompt(arguments):
    options = study.parse(arguments())
    pairs = study.make_data(options, Run("single", 0)).read("test")
    places = study.sample(options, pairs)
    assert len(places) == 10 == len({pairs[place].prompt for place in places}) and places == sorted(places)


def test_the_gold_reward_is_the_mean_of_its_seeds(arguments):
    options = study.parse(arguments("--gold-limit", "3"))
    # It is told the group.
    rows = [{"differences": {"": "-1 -1 -1", "oracle": text}} for text in ("1 -1 4", "-3 2 1")]
    assert study.gold_report(options, rows)["agreement"] == pytest.approx(100 * 2 / 3)


@pytest.mark.parametrize(("gain", "said"), [(0, "did not pay"), (60, "paid")])
def test_a_verdict_is_about_the_best_baseline(folder, arguments, gain, said):
    report = study.make_report(study.read_rows(study.parse(arguments())))
    assert study.verdict(report, "dmoerm") == "", "not all baselines have been run"
    report.scores.update({name: np.full_like(report.scores["single"], 40) for name in (*BASELINES, *READINGS)})
    best = "ensemble/worst" if gain else "gate"
    report.scores[best] += 0.5
    report.scores["dmoerm"] = report.scores[best] + gain
    report.scores["dmoerm/random"] = report.scores["dmoerm"] - gain / 60
    found = study.verdict(report, "dmoerm")
    named = f"{METHODS['ensemble'].what}, read as worst" if gain else METHODS["gate"].what
    assert f"best of 7 readings of baselines ({named})" in found and f"the mixture {said}. The router" in found
    better, alike = "better than a random one: +1.0 [+1.0, +1.0].", "told from a random one: +0.0 [+0.0, +0.0]."
    assert found.endswith(better if gain else alike)
    del report.scores["dmoerm/random"]
    assert study.verdict(report, "dmoerm").endswith(f"the mixture {said}.")
    assert study.verdict(report, "single") == "", "it is no mixture"


# --- the policy ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words(bases, folder):
    """The command line of the policy."""
    counts = {"prompts": 3, "answers": 4, "tokens": 5, "rounds": 2, "teach-prompts": 3, "picked-from": 2, "judged": 2}
    options = [text for name, count in counts.items() for text in (f"--{name}", str(count))]
    options += ["--source", "generated", "--base", bases[0], "--policy", bases[1], "--folder", str(folder)]
    return [*options, "--proxies", "dmoerm", "single", "ensemble/worst", "--seeds", "0", "--gold", "0", "1"]


def test_best_of_n_and_distillation(words, folder, monkeypatch):
    policy.main(words)
    found = json.loads((folder / "policy.json").read_text())
    proxies = ("dmoerm", "single", "ensemble/worst", "longer", "random")
    assert [(line["model"], line["n"]) for line in found["curves"]] == [
        (name, n) for name in proxies for n in (1, 2, 4)
    ]
    # One of one is the same whoever picks it, and all of n together are the policy.
    assert len({round(line["gold"], 9) for line in found["curves"] if line["n"] == 1}) == 1
    assert [line["compared"] for line in found["differences"]] == [f"dmoerm - {name}" for name in proxies[1:]]
    for line in found["differences"]:
        own = {of["model"]: of["gold"] for of in found["curves"] if of["n"] == 4}
        other = line["compared"].removeprefix("dmoerm - ")
        assert line["mean"] == pytest.approx(own["dmoerm"] - own[other])
    assert [line["proxy"] for line in found["distillation"]] == ["dmoerm", "single", "random"]
    rows = [row(folder, f"picks-{name}.seed0")["rewards"] for name in ("dmoerm", "single", "ensemble-worst")]
    assert len({len(of) for of in rows}) == 1 and len({str(of) for of in rows}) == 3
    assert all(line["seeds"] == 1 for line in found["distillation"])
    assert (folder / "best_of_n.png").is_file()
    # The gold reward is told to which inner model a prompt belongs.
    options = policy.parse(words)
    category = policy.prompts_of(options, "test", 3)
    model = policy.load_proxy(options, "gold", 0)
    for number, (prompt, answers) in enumerate(policy.draw_answers(options).items()):
        told = policy.candidates_of(prompt, answers, category)
        assert {one.category for one in told} == {category[prompt]} and category[prompt] in EACH
        other = [replace(one, category=next(name for name in EACH if name != one.category)) for one in told]
        kept = study.numbers(row(folder, "picks-gold.seed0")["rewards"][number])
        right, wrong = (policy.rate([model], policy.load_tokenizer(options.base), of)[0] for of in (told, other))
        np.testing.assert_allclose(kept, right, atol=1e-3)
        assert np.abs(kept - wrong).max() > 1e-3
    # A second call draws and teaches nothing.
    monkeypatch.setattr(policy, "Policy", None)
    policy.main(words)
    policy.main([*words, "--only", "table"])
    with pytest.raises(ValueError, match="tokens=5"):
        policy.main([*words, "--tokens", "6"])
    for name in ("distil-random", "distil-single", "picks-single"):
        path = folder / f"results/generated.{name}.seed0.json"
        path.write_text(path.read_text().replace('weights": "', 'weights": "0'))
        with pytest.raises(ValueError, match="has weights="):
            policy.main([*words, "--only", "table"])
        path.write_text(path.read_text().replace('weights": "0', 'weights": "'))
    path = folder / "runs/answers/generated.0.json"
    path.write_text(path.read_text().replace('"drawn": [', '"drawn": ["another one",'))
    with pytest.raises(ValueError, match="has drawn="):
        policy.main([*words, "--only", "table"])


@pytest.mark.parametrize("name", ["single/worst", "ensemble/wurst", "dmoer"])
def test_a_proxy_or_a_reading_that_there_is_not(words, name):
    with pytest.raises(UnknownNameError, match=name):
        policy.main([*words, "--taught", name])


def test_short_prompts_of_one_turn():
    pairs = [
        study.Pair(prompt, "a", "b", "", str(number))
        for number, prompt in enumerate(
            ["user: one", "user: one", "Human: two\n\nAssistant: so\n\nHuman: three", "x" * 999]
        )
    ]
    assert policy.single_turns([replace(pair, category="Chat") for pair in pairs], 5) == {"user: one": "Chat"}
    assert policy.spoken("Human: what is a user: this?") == "what is a user: this?"
