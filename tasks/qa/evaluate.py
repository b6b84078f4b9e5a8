"""How good answers are, domain by domain and with intervals; a baseline without parameters; what experts specialise in.

EM and F1 are SQuAD's (Rajpurkar et al. 2016), in percent. One domain holds most of the questions, so the two numbers of
a model are macro: means over the domains it has learned from, and over those it has not (out of domain, OOD). Questions
about the same document are not independent, and neither are runs that share data: intervals are bootstraps over
documents and seeds, and two models are compared on the same documents.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from zoo.comparison import Array, Comparison, Row, draw
from zoo.errors import UnknownNameError
from zoo.moe import Dependence, group_dependence

if TYPE_CHECKING:
    from tasks.qa.examples import Example

PERCENT = 100
MEASURES = ("f1", "em")
ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)
# Where a sentence ends: after its last mark, before a space; and at the end of a line.
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")

Places = NDArray[np.intp]


class Scores(NamedTuple):
    """`(questions,)` F1 and EM of one run's answers, in percent."""

    f1: Array
    em: Array


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Domain:
    """The questions of one domain.

    Attributes:
        name: As in the examples.
        ood: Whether it is out of domain.
        questions: `(n,)` their positions among all.
        documents: `(n,)` the document of each, numbered from 0.
        draws: `(RESAMPLES, documents)` how often each document is drawn; NaN where there is only one.
    """

    name: str
    ood: bool
    questions: Places
    documents: Places
    draws: Array


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Report(Comparison):
    """Scores of several models on the same questions; intervals are over documents.

    Its metrics are `f1_in` and `em_in`, macro over the domains learned from; `f1_ood` and `em_ood`, macro over the
    others; `f1_ood_pooled` and `em_ood_pooled`, means over the questions of those, as the paper averages; `<domain>/f1`
    and `<domain>/em`. Where all domains are of one kind, those of the other are missing.

    Attributes:
        domains: Those that were learned from first, each kind in the order of the examples.
        scores: By model and measure (`f1`, `em`): `(seeds, questions)`.
    """

    domains: tuple[Domain, ...]
    scores: dict[str, dict[str, Array]]

    @classmethod
    def of(
        cls,
        examples: "Sequence[Example]",
        scores: Mapping[str, Sequence[Scores]],
        ood_domains: Collection[str] = (),
    ) -> "Report":
        """Bring runs together.

        Args:
            examples: The questions.
            scores: Of `score_answers`, by model: one for each of its seeds.
            ood_domains: Domains that no model has learned from, or only from the few examples of the OOD stage.

        Raises:
            UnknownNameError: No question is of such a domain.
            ValueError: There is no question, or a model has no run or one of other questions.
        """
        if not examples:
            raise ValueError("There are no questions to report on.")
        names = dict.fromkeys(example.domain for example in examples)
        for name in ood_domains:
            if name not in names:
                raise UnknownNameError("domain", name, names)
        for model, runs in scores.items():
            sizes = {len(run.f1) for run in runs}
            if sizes != {len(examples)}:
                raise ValueError(f"The runs of {model!r} score {sorted(sizes)} questions; there are {len(examples)}.")
        random = np.random.default_rng(0)
        domains = tuple(
            _gather(examples, name, name in ood_domains, random)
            for name in sorted(names, key=lambda name: name in ood_domains)
        )
        stacked = {
            model: {measure: np.stack([getattr(run, measure) for run in runs]) for measure in MEASURES}
            for model, runs in scores.items()
        }
        return cls(domains, stacked)

    def names(self) -> Collection[str]:
        """The models."""
        return self.scores

    def metric_names(self) -> list[str]:
        """Names of the metrics."""
        macro = [f"{measure}_{kind}" for kind in self._kinds() for measure in MEASURES]
        pooled = [f"{measure}_ood_pooled" for measure in MEASURES if "ood" in self._kinds()]
        return macro + pooled + [f"{domain.name}/{measure}" for domain in self.domains for measure in MEASURES]

    def metrics(self, model: str) -> dict[str, float]:
        """As `Comparison.metrics`, and `<domain>/n`, the number of questions."""
        counts = {f"{domain.name}/n": float(len(domain.questions)) for domain in self.domains}
        return Comparison.metrics(self, model) | counts

    def domain_rows(self, model: str) -> list[Row]:
        """A model domain by domain: number of questions and documents, EM, and F1 with its interval.

        Args:
            model: Its name.
        """
        return [
            {
                "domain": domain.name,
                "OOD": "yes" if domain.ood else "",
                "n": len(domain.questions),
                "documents": domain.draws.shape[1],
                "em": float(self.values(model, f"{domain.name}/em").mean()),
                **{f"f1 {key}": value for key, value in self.interval(model, f"{domain.name}/f1")._asdict().items()},
            }
            for domain in self.domains
        ]

    def values(self, model: str, key: str) -> Array:
        """As `Comparison.values`."""
        scores, domains, pooled = self._find(model, key)
        if pooled:
            return scores[:, np.concatenate([domain.questions for domain in domains])].mean(axis=1)
        return np.mean([scores[:, domain.questions].mean(axis=1) for domain in domains], axis=0)

    def _kinds(self) -> list[str]:
        return [kind for kind in ("in", "ood") if any(domain.ood == (kind == "ood") for domain in self.domains)]

    def _find(self, model: str, key: str) -> tuple[Array, list[Domain], bool]:
        """The `(seeds, questions)` that a metric reads, its domains, and whether their questions are pooled."""
        self.check(model, key)
        if "/" in key:
            name, measure = key.rsplit("/", 1)
            return self.scores[model][measure], [domain for domain in self.domains if domain.name == name], False
        measure, kind, *pooled = key.split("_")
        return (
            self.scores[model][measure],
            [domain for domain in self.domains if domain.ood == (kind == "ood")],
            bool(pooled),
        )

    def resample(self, model: str, key: str) -> Array:
        """As `Comparison.resample`: documents are drawn."""
        scores, domains, pooled = self._find(model, key)
        sums, counts = [], []
        for domain in domains:
            of_documents = np.zeros((domain.draws.shape[1], len(scores)))
            np.add.at(of_documents, domain.documents, scores[:, domain.questions].T)
            sums.append(domain.draws @ of_documents)
            counts.append(domain.draws @ np.bincount(domain.documents)[:, None])
        if pooled:
            return np.sum(sums, axis=0) / np.sum(counts, axis=0)
        return np.mean([total / count for total, count in zip(sums, counts, strict=True)], axis=0)


def normalise_answer(text: str) -> str:
    """An answer as SQuAD compares it: lower case, without ASCII punctuation and articles, single spaces.

    Args:
        text: The answer.
    """
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """100 where an answer is one of the accepted ones once both are normalised, else 0.

    Args:
        answer: What was answered; empty for no answer.
        accepted: Every right answer. None says that the context has no answer, and no answer is right (SQuAD v2).
    """
    return _best_of(lambda ours, theirs: float(ours == theirs), answer, accepted)


def f1_score(answer: str, accepted: Sequence[str]) -> float:
    """F1 over the words of an answer and of the accepted one that fits best, both normalised, in percent.

    Where nothing is left of either (no answer, or articles and punctuation alone), only the same is right: 100 if
    nothing is left of both, else 0.

    Args:
        answer: As for `exact_match`.
        accepted: As for `exact_match`.
    """
    return _best_of(_word_f1, answer, accepted)


def score_answers(examples: "Sequence[Example]", answers: Sequence[str]) -> Scores:
    """Score a run's answers.

    Args:
        examples: The questions with their accepted answers.
        answers: One for each; empty for no answer.

    Raises:
        ValueError: There is not one answer for each question.
    """
    if len(examples) != len(answers):
        raise ValueError(f"{len(answers)} answers to {len(examples)} questions: expected one for each.")
    pairs = [(answer, example.answers) for example, answer in zip(examples, answers, strict=True)]
    return Scores(np.array([f1_score(*pair) for pair in pairs]), np.array([exact_match(*pair) for pair in pairs]))


def overlap_answers(examples: "Iterable[Example]") -> list[str]:
    """A baseline without parameters: the sentence of the context with the most of the question's words.

    Args:
        examples: The questions.

    Returns:
        A sentence for each; the shortest of those that share the most words, and of these the first.
    """
    return [_overlapping(example.question, example.context) for example in examples]


def domain_dependence(
    loads: Mapping[str, Array],
    domains: Sequence[str],
    documents: Sequence[str],
    permutations: int = 500,
    seed: int = 0,
) -> dict[str, Dependence]:
    """Whether routing follows domains: `group_dependence` over documents, since questions on one are not independent.

    Args:
        loads: `(questions, E)` by layer, of `expert_loads`.
        domains: Of each question.
        documents: Of each question; a document of several domains counts as one in each.
        permutations: How often chance is tried.
        seed: Of the permutations.
    """
    pairs, of_pair = _number(list(zip(domains, documents, strict=True)))
    by_document = {layer: np.zeros((len(pairs), load.shape[1])) for layer, load in loads.items()}
    for layer, load in loads.items():
        np.add.at(by_document[layer], of_pair, load)
    return group_dependence(by_document, [domain for domain, _ in pairs], permutations, seed)


def _best_of(measure: Callable[[str, str], float], answer: str, accepted: Sequence[str]) -> float:
    ours = normalise_answer(answer)
    return PERCENT * max(measure(ours, normalise_answer(text)) for text in accepted or ("",))


def _word_f1(ours: str, theirs: str) -> float:
    if not ours or not theirs:
        return float(ours == theirs)
    first, second = ours.split(), theirs.split()
    shared = (Counter(first) & Counter(second)).total()
    return 2 * shared / (len(first) + len(second))


def _overlapping(question: str, context: str) -> str:
    asked = set(normalise_answer(question).split())
    sentences = [sentence for sentence in SENTENCE_END.split(context) if sentence.strip()]

    def fit(sentence: str) -> tuple[int, int]:
        words = normalise_answer(sentence).split()
        return len(asked.intersection(words)), -len(words)

    return max(sentences, key=fit, default="")


def _gather(examples: "Sequence[Example]", name: str, ood: bool, random: np.random.Generator) -> Domain:
    questions = np.array([place for place, example in enumerate(examples) if example.domain == name])
    names, documents = _number([examples[place].document for place in questions])
    draws = draw(len(names), random)
    return Domain(name, ood, questions, documents, draws if len(names) > 1 else draws * np.nan)


def _number(labels: Iterable[Any]) -> tuple[list[Any], Places]:
    """The different labels in their order, and the position there of each."""
    places: dict[Any, int] = {}
    numbers = [places.setdefault(label, len(places)) for label in labels]
    return list(places), np.array(numbers, dtype=np.intp)
