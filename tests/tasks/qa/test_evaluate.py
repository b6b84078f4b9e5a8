"""Scores against torchmetrics, intervals against textbooks and a loop, routing by domain against scikit-learn."""

import os
from pathlib import Path

import numpy as np
import pytest
from torchmetrics.functional.text import squad
from torchmetrics.text import SQuAD

from tasks.qa.evaluate import (
    Report,
    Scores,
    domain_dependence,
    exact_match,
    f1_score,
    normalise_answer,
    overlap_answers,
    score_answers,
)
from tasks.qa.examples import Example, generate_examples, read_examples
from zoo.comparison import RESAMPLES, Interval
from zoo.errors import UnknownNameError

# What normalising has to get right: articles as words and as parts of words, capitals that change length, combining
# marks, punctuation within and outside ASCII, spaces of many kinds, words that are nothing but punctuation.
WORDS = (
    *("the", "a", "An", "THE", "theme", "banana", "an-a", "A.", "'the'", "la the", "the的", "的", "東京"),
    *("Straße", "STRASSE", "İstanbul", "ﬁn", "café", "cafe\u0301", "“quoted”", "--", "...", "U.S.", "1,000", "$5"),
    *("dog", "Dog", "cat", "x_y", "don't", "…", "\u00a0", "\u200b", "🙂"),
)
SPACES = (" ", " ", " ", "", "\n", "\t", "  ", "\u2003")


def phrase(random: np.random.Generator) -> str:
    return "".join(random.choice(WORDS) + random.choice(SPACES) for _ in range(random.integers(0, 6)))


def asked(domain: str = "d", document: str = "t", *answers: str, context: str = "", question: str = "?") -> Example:
    return Example(f"{domain}{document}", domain, document, question, context, answers, (0,) * len(answers))


def runs(values) -> list[Scores]:
    """One for each row of F1; EM is half of that."""
    return [Scores(row, row / 2) for row in np.atleast_2d(values)]


def questions(**documents: list[int]) -> list[Example]:
    """Of domains, by name, with so many questions for each of their documents."""
    return [
        asked(domain, f"{domain} {number}")
        for domain, sizes in documents.items()
        for number, size in enumerate(sizes)
        for _ in range(size)
    ]


# --- EM and F1


def test_scores_are_torchmetrics() -> None:
    random = np.random.default_rng(0)
    for _ in range(400):
        answer, accepted = phrase(random), [phrase(random) for _ in range(random.integers(1, 4))]
        if random.random() < 0.3:
            accepted[-1] = f" the {answer}!".title()
        target = {"answers": {"text": accepted, "answer_start": []}, "id": "0"}
        expected = squad({"prediction_text": answer, "id": "0"}, target)
        assert f1_score(answer, accepted) == pytest.approx(float(expected["f1"]), rel=1e-5)
        assert exact_match(answer, accepted) == float(expected["exact_match"])


def test_means_are_torchmetrics() -> None:
    random = np.random.default_rng(9)
    examples = [asked("d", "t", *(phrase(random) for _ in range(random.integers(1, 4)))) for _ in range(200)]
    answers = [example.answers[-1] if random.random() < 0.4 else phrase(random) for example in examples]
    metric = SQuAD()
    for number, (example, answer) in enumerate(zip(examples, answers, strict=True)):
        target = {"answers": {"text": list(example.answers), "answer_start": []}, "id": str(number)}
        metric.update([{"prediction_text": answer, "id": str(number)}], [target])
    scores = score_answers(examples, answers)
    assert scores.f1.mean() == pytest.approx(float(metric.compute()["f1"]), rel=1e-5)
    assert scores.em.mean() == pytest.approx(float(metric.compute()["exact_match"]), rel=1e-5)
    assert 0 < scores.em.mean() < scores.f1.mean() < 100


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Quick, brown\nfox.", "quick brown fox"),
        ("An a-the", "athe"),
        ("“A” Çağ", "“ ” çağ"),
        ("the", ""),
        ("", ""),
    ],
)
def test_normalise_answer(text, normal) -> None:
    assert normalise_answer(text) == normal


def test_the_best_of_several_answers_counts() -> None:
    accepted = ("in the year 1912", "1912", "the spring of 1912")
    assert f1_score("1912", accepted) == exact_match("1912.", accepted) == 100
    assert f1_score("spring 1912", accepted) == pytest.approx(100 * 2 * 2 / (2 + 3))
    assert exact_match("spring 1912", accepted) == 0


def test_no_answer_is_right_only_where_there_is_none() -> None:
    """SQuAD v2: a question without answers is one whose only answer is the empty string."""
    for measure in (f1_score, exact_match):
        assert measure("", ()) == measure("", ("",)) == 100
        assert measure("Paris", ()) == 0
        assert measure("", ("Paris",)) == 0
        # Nothing but an article is no answer, as in SQuAD's script.
        assert measure("the", ()) == 100


def test_one_answer_for_each_question() -> None:
    with pytest.raises(ValueError, match="1 answers to 2 questions"):
        score_answers([asked(), asked()], ["x"])


# --- the report


def test_macro_and_pooled_means() -> None:
    examples = questions(far=[2, 1], big=[5, 3], small=[1, 1], away=[1, 0, 1])
    values = np.arange(15.0)
    report = Report.of(examples, {"ours": runs([values, values + 3])}, ["away", "far"])
    assert [domain.name for domain in report.domains] == ["big", "small", "far", "away"]
    far, big, small, away = values[:3], values[3:11], values[11:13], values[13:15]
    expected = {
        "f1_in": (big.mean() + small.mean()) / 2,
        "em_in": (big.mean() + small.mean()) / 4,
        "f1_ood": (far.mean() + away.mean()) / 2,
        "em_ood": (far.mean() + away.mean()) / 4,
        "f1_ood_pooled": np.concatenate([far, away]).mean(),
        "em_ood_pooled": np.concatenate([far, away]).mean() / 2,
        "big/f1": big.mean(),
        "big/em": big.mean() / 2,
        "small/f1": small.mean(),
        "small/em": small.mean() / 2,
        "far/f1": far.mean(),
        "far/em": far.mean() / 2,
        "away/f1": away.mean(),
        "away/em": away.mean() / 2,
    }
    assert report.metric_names() == list(expected)
    metrics = report.metrics("ours")
    for name, value in expected.items():
        assert metrics.pop(name) == pytest.approx(value + (0.75 if "em" in name else 1.5)), name
        np.testing.assert_allclose(report.values("ours", name), [value, value + (1.5 if "em" in name else 3)])
        assert report.interval("ours", name).mean == pytest.approx(value + (0.75 if "em" in name else 1.5))
    assert metrics == {"big/n": 8, "small/n": 2, "far/n": 3, "away/n": 2}


def test_metrics_of_others_have_their_name_before() -> None:
    examples = questions(race=[1, 1], squad=[1, 1])
    ones = np.ones(4)
    report = Report.of(examples, {"dense": runs(ones), "moe": runs(3 * ones), "twin": runs(2 * ones)}, ["race"])
    metrics = report.all_metrics("moe")
    assert list(metrics)[:4] == ["f1_in", "em_in", "f1_ood", "em_ood"]
    assert (metrics["f1_ood"], metrics["twin/f1_ood"], metrics["dense/f1_ood"]) == (3, 2, 1)
    assert (metrics["race/f1"], metrics["race/n"], metrics["dense/race/em"]) == (3, 2, 0.5)
    assert "moe/f1_ood" not in metrics and "twin/race/n" not in metrics


@pytest.mark.parametrize(("ood", "kind"), [((), "in"), (("a", "b"), "ood")])
def test_one_kind_of_domain(ood, kind) -> None:
    report = Report.of(questions(a=[1, 1], b=[1, 1]), {"ours": runs(np.ones(4))}, ood)
    pooled = ["f1_ood_pooled", "em_ood_pooled"] if ood else []
    assert report.metric_names()[:-4] == [f"f1_{kind}", f"em_{kind}", *pooled]


def test_tables() -> None:
    examples = questions(race=[1, 1], squad=[2, 1])
    values = np.array([[0.0, 10, 20, 30, 40], [0, 20, 20, 30, 40]])
    report = Report.of(examples, {"ours": runs(values), "fixed": runs(values[0])}, ["race"])
    first, spread, second = report.rows()
    assert (first["model"], spread["model"], second["model"]) == ("ours", "+- over 2 seeds", "fixed")
    assert (first["f1_ood"], second["f1_ood"], first["squad/em"]) == (7.5, 5, 15)
    assert spread["f1_ood"] == pytest.approx(np.std([5, 10], ddof=1)) and spread["f1_in"] == 0
    assert list(report.rows(["f1_in"])[0]) == ["model", "f1_in"]
    squad, race = report.domain_rows("ours")
    assert list(squad) == ["domain", "OOD", "n", "documents", "em", "f1 mean", "f1 low", "f1 high"]
    assert tuple(squad.values())[:6] == ("squad", "", 3, 2, 15, 30)
    assert tuple(race.values())[:6] == ("race", "yes", 2, 2, 3.75, 7.5)
    rows = report.difference_rows("ours", "fixed", ["f1_ood", "squad/f1"])
    assert [(row["metric"], row["mean"]) for row in rows] == [("f1_ood", 2.5), ("squad/f1", 0)]
    assert rows[0]["low"] <= 2.5 <= rows[0]["high"] and rows[1]["low"] == rows[1]["high"] == 0


def test_refusals() -> None:
    examples = questions(race=[1, 1])
    report = Report.of(examples, {"ours": runs(np.ones(2))}, ["race"])
    with pytest.raises(UnknownNameError, match=r"Unknown domain 'rase'\. Did you mean 'race'"):
        Report.of(examples, {}, ["rase"])
    with pytest.raises(UnknownNameError, match="Unknown model 'our'"):
        report.metrics("our")
    with pytest.raises(UnknownNameError, match="Unknown metric 'f1_in'"):
        report.interval("ours", "f1_in")
    with pytest.raises(ValueError, match=r"'ours' score \[3\] questions; there are 2"):
        Report.of(examples, {"ours": runs(np.ones(3))})
    with pytest.raises(ValueError, match=r"'ours' score \[\] questions"):
        Report.of(examples, {"ours": []})
    with pytest.raises(ValueError, match="no questions"):
        Report.of([], {})


# --- intervals


def test_intervals_are_quantiles_of_a_loop_over_drawn_documents() -> None:
    random = np.random.default_rng(0)
    sizes = {"big": [4, 1, 2, 7], "far": [2, 5, 1], "away": [1, 1, 1, 3, 1]}
    examples = questions(**sizes)
    random.shuffle(examples)
    values = random.uniform(0, 100, len(examples))
    report = Report.of(examples, {"ours": runs(values)}, ["far", "away"])
    resampled = []
    for number in range(RESAMPLES):
        drawn = {}
        for domain in report.domains:
            assert domain.draws[number].sum() == len(sizes[domain.name])
            times = domain.draws[number].astype(int)[domain.documents]
            drawn[domain.name] = [v for v, n in zip(values[domain.questions], times, strict=True) for _ in range(n)]
        big, far, away = (sum(drawn[name]) / len(drawn[name]) for name in sizes)
        pooled = sum(drawn["far"] + drawn["away"]) / len(drawn["far"] + drawn["away"])
        resampled.append([(far + away) / 2, pooled, big / 2, big, away / 2])
    quantiles = np.quantile(resampled, (0.025, 0.975), axis=0).T
    for name, expected in zip(("f1_ood", "f1_ood_pooled", "em_in", "big/f1", "away/em"), quantiles, strict=True):
        np.testing.assert_allclose(report.interval("ours", name)[1:], expected, rtol=1e-9, err_msg=name)


def test_interval_of_independent_questions_is_the_textbooks() -> None:
    random = np.random.default_rng(0)
    values = np.concatenate([random.normal(50, 20, 900), random.normal(40, 10, 100)])
    report = Report.of(questions(a=[1] * 900, b=[1] * 100), {"ours": runs(values)})
    of_a, of_b = (values[:900].std(ddof=1) / 30, values[900:].std(ddof=1) / 10)
    for name, error in {"a/f1": of_a, "b/f1": of_b, "f1_in": np.hypot(of_a, of_b) / 2}.items():
        mean, low, high = report.interval("ours", name)
        np.testing.assert_allclose([low, high], [mean - 1.96 * error, mean + 1.96 * error], atol=0.15 * error)
    assert report.interval("ours", "f1_in") == report.interval("ours", "f1_in")


def test_interval_widens_where_questions_share_a_document() -> None:
    random = np.random.default_rng(0)
    values = random.normal(50, 20, 100).repeat(5)
    together = Report.of(questions(a=[5] * 100), {"ours": runs(values)}).interval("ours", "f1_in")
    apart = Report.of(questions(a=[1] * 500), {"ours": runs(values)}).interval("ours", "f1_in")
    assert np.ptp(together[1:]) == pytest.approx(np.sqrt(5) * np.ptp(apart[1:]), rel=0.15)


def test_interval_covers_seeds() -> None:
    random = np.random.default_rng(0)
    examples = questions(a=[1] * 400)
    values = random.normal(50, 5, 400) + random.normal(0, 2, (5, 1)) + random.normal(0, 0.1, (5, 400))
    report = Report.of(examples, {"runs": runs(values), "mean": runs(values.mean(axis=0))})
    over_both, over_documents = report.interval("runs", "f1_in"), report.interval("mean", "f1_in")
    assert over_both.mean == pytest.approx(over_documents.mean)
    expected = 1.96 * np.sqrt(values.mean(axis=0).var() / 400 + values.mean(axis=1).var() / 5)
    assert np.ptp(over_both[1:]) / 2 == pytest.approx(expected, rel=0.1)
    assert np.ptp(over_both[1:]) > 1.5 * np.ptp(over_documents[1:])


def test_paired_difference_removes_what_documents_share() -> None:
    random = np.random.default_rng(0)
    examples = questions(a=[2] * 100, b=[1] * 50)
    shared = np.concatenate([random.normal(50, 20, 100).repeat(2), random.normal(50, 20, 50)])
    first, second = (shared + mean + random.normal(0, 1, (3, 250)) for mean in (2, 1))
    report = Report.of(examples, {"first": runs(first), "second": runs(second), "fewer": runs(first[:2])})
    difference = report.difference("first", "second", "f1_in")
    assert difference.mean == pytest.approx(
        report.interval("first", "f1_in").mean - report.interval("second", "f1_in").mean
    )
    assert 0.5 < difference.low < difference.mean < difference.high < 1.5
    assert np.ptp(report.interval("first", "f1_in")[1:]) > 4
    backwards = report.difference("second", "first", "f1_in")
    assert backwards.mean == pytest.approx(-difference.mean) and backwards.high < 0
    # Seeds of two models have nothing in common.
    for other in ("first", "fewer"):
        assert report.difference("first", other, "f1_in").low < 0 < report.difference("first", other, "f1_in").high
    alone = Report.of(examples, {"ours": runs(first[0])})
    assert alone.difference("ours", "ours", "f1_in") == (0, 0, 0, 1)


def test_a_domain_of_one_document_has_no_interval() -> None:
    report = Report.of(questions(a=[4], b=[1, 1]), {"ours": runs(np.arange(6.0))})
    for name in ("a/f1", "f1_in"):
        mean, low, high = report.interval("ours", name)
        assert np.isfinite(mean) and np.isnan(low) and np.isnan(high)
    assert np.isfinite(report.interval("ours", "b/f1")).all()


def test_a_document_of_two_domains_is_one_in_each() -> None:
    examples = [
        asked("a", "shared"),
        asked("a", "own"),
        asked("b", "shared"),
        asked("b", "shared"),
        asked("b", "third"),
    ]
    report = Report.of(examples, {"ours": runs(np.arange(5.0))})
    assert [domain.documents.tolist() for domain in report.domains] == [[0, 1], [0, 0, 1]]


# --- the baseline


def test_overlap_answers() -> None:
    context = (
        "Rome fell. The river Tiber flows through Rome, which is old! Is the river long?\n"
        "Turin\nThe river Po flows through Turin.\n\nVersion 2.0 of the map shows it"
    )
    asking = {
        "Which river flows through Rome?": "The river Tiber flows through Rome, which is old!",
        "which RIVER flows through turin??": "The river Po flows through Turin.",
        "What does version 2.0 show?": "Version 2.0 of the map shows it",
        # Nothing in common: the shortest.
        "Who?": "Turin",
    }
    examples = [asked(context=context, question=question) for question in asking]
    assert overlap_answers(examples) == list(asking.values())
    assert overlap_answers([asked(context=" \n ", question="Who?")]) == [""]


@pytest.mark.skipif(not os.environ.get("MOE_ZOO_DATA"), reason="MOE_ZOO_DATA names no data")
def test_baseline_on_real_questions() -> None:
    """What costs nothing is well above 0 and far below a reader; sentences of the context are returned as they are."""
    examples = read_examples(Path(os.environ["MOE_ZOO_DATA"], "qa", "ood_val.parquet"))
    answers = overlap_answers(examples)
    assert all(answer and answer in example.context for answer, example in zip(answers, examples, strict=True))
    report = Report.of(examples, {"overlap": [score_answers(examples, answers)]}, {e.domain for e in examples})
    mean, low, high = report.interval("overlap", "f1_ood")
    assert 5 < low < mean < high < 20
    assert sum(report.metrics("overlap")[f"{domain.name}/n"] for domain in report.domains) == 382


# --- routing by domain


def test_chance_is_that_of_whole_documents() -> None:
    """Documents with experts of their own look like domains with experts of their own, but no more than by chance."""
    random = np.random.default_rng(0)
    documents = [f"{document}" for document in range(24) for _ in range(20)]
    domains = ["abc"[int(document) % 3] for document in documents]
    own = random.dirichlet(np.full(4, 0.5), 24).repeat(20, axis=0)
    explained, chance, p_value = domain_dependence({"": own}, domains, documents)[""]
    assert explained > 0.02 and chance > 0.02 and p_value > 0.1
    by_question = domain_dependence({"": own}, domains, [str(number) for number in range(480)])[""]
    assert by_question.chance < chance / 5 and by_question.p_value < 0.05
    followed = own + 2 * np.eye(4)[["abc".index(domain) for domain in domains]]
    assert domain_dependence({"": followed}, domains, documents)[""].p_value == pytest.approx(1 / 501)
    first, second = (domain_dependence({"": own}, domains, documents) for _ in range(2))
    assert first == second


def test_a_perfect_run_of_generated_questions() -> None:
    examples = generate_examples(30)
    report = Report.of(examples, {"oracle": [score_answers(examples, [e.answers[0] for e in examples])]})
    assert report.interval("oracle", "f1_in") == Interval(100, 100, 100)
