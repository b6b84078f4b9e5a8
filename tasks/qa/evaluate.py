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

from zoo.errors import UnknownNameError

if TYPE_CHECKING:
    from tasks.qa.examples import Example
    from zoo.moe import RoutingOutput

PERCENT = 100
RESAMPLES = 2000
MEASURES = ("f1", "em")
ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)
# Where a sentence ends: after its last mark, before a space; and at the end of a line.
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")

Array = NDArray[np.float64]
Places = NDArray[np.intp]
Row = dict[str, Any]


class Scores(NamedTuple):
    """`(questions,)` F1 and EM of one run's answers, in percent."""

    f1: Array
    em: Array


class Interval(NamedTuple):
    """A mean and the 95 % bootstrap interval around it; the bounds are NaN where a domain has a single document."""

    mean: float
    low: float
    high: float


class Dependence(NamedTuple):
    """How much the domain says about the expert.

    Attributes:
        explained: Share of the entropy of the experts that the domain explains: 0 where tokens of all domains go to the
            same experts in the same shares, 1 where the domain decides which expert a token goes to.
        chance: The mean of that if documents are dealt out to the domains at random.
        p_value: How often chance explains as much.
    """

    explained: float
    chance: float
    p_value: float


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
class Report:
    """Scores of several models on the same questions.

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

    def metric_names(self) -> list[str]:
        """Names of the metrics."""
        macro = [f"{measure}_{kind}" for kind in self._kinds() for measure in MEASURES]
        pooled = [f"{measure}_ood_pooled" for measure in MEASURES if "ood" in self._kinds()]
        return macro + pooled + [f"{domain.name}/{measure}" for domain in self.domains for measure in MEASURES]

    def metrics(self, model: str) -> dict[str, float]:
        """A model's metrics, means over its seeds, and `<domain>/n`, the number of questions.

        Args:
            model: Its name.

        Raises:
            UnknownNameError: There is no such model.
        """
        counts = {f"{domain.name}/n": float(len(domain.questions)) for domain in self.domains}
        return {key: float(self.values(model, key).mean()) for key in self.metric_names()} | counts

    def all_metrics(self, model: str) -> dict[str, float]:
        """A model's metrics, and those of the others as `<other>/<metric>`: what `test` returns.

        Args:
            model: The one that is reported on.
        """
        metrics = self.metrics(model)
        for other in self.scores:
            if other != model:
                metrics |= {f"{other}/{key}": float(self.values(other, key).mean()) for key in self.metric_names()}
        return metrics

    def rows(self, keys: Sequence[str] | None = None) -> list[Row]:
        """Metrics as a table: one row per model and, where it has several seeds, one of their deviation.

        Args:
            keys: The columns; all by default.
        """
        rows: list[Row] = []
        for model, scores in self.scores.items():
            values = {key: self.values(model, key) for key in keys or self.metric_names()}
            rows.append({"model": model} | {key: float(of.mean()) for key, of in values.items()})
            seeds = len(scores["f1"])
            if seeds > 1:
                deviations = {key: float(of.std(ddof=1)) for key, of in values.items()}
                rows.append({"model": f"+- over {seeds} seeds"} | deviations)
        return rows

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
        """A metric of each of a model's runs, `(seeds,)`.

        Args:
            model: Its name.
            key: One of `metric_names()`.

        Raises:
            UnknownNameError: There is no such model or metric.
        """
        scores, domains, pooled = self._find(model, key)
        if pooled:
            return scores[:, np.concatenate([domain.questions for domain in domains])].mean(axis=1)
        return np.mean([scores[:, domain.questions].mean(axis=1) for domain in domains], axis=0)

    def interval(self, model: str, key: str) -> Interval:
        """A metric's mean with its 95 % interval over documents and seeds.

        In each resample, as many documents of each domain as there are, and as many seeds, are drawn with replacement,
        and the metric is computed anew.

        Args:
            model: Its name.
            key: One of `metric_names()`.
        """
        resampled = _draw_seeds(self._resample(model, key), np.random.default_rng(1))
        return _interval(self.values(model, key).mean(), resampled)

    def difference(self, first: str, second: str, key: str) -> Interval:
        """How much a model is above another, as `interval`: documents are drawn for both at once, seeds for each.

        Args:
            first: A model.
            second: The other; it may have another number of seeds.
            key: One of `metric_names()`.
        """
        random = np.random.default_rng(1)
        ours = _draw_seeds(self._resample(first, key), random)
        theirs = _draw_seeds(self._resample(second, key), random)
        return _interval(self.values(first, key).mean() - self.values(second, key).mean(), ours - theirs)

    def difference_rows(self, first: str, second: str, keys: Sequence[str] | None = None) -> list[Row]:
        """How much a model is above another, a row for each metric.

        Args:
            first: A model.
            second: The other.
            keys: Metrics; all by default.
        """
        return [{"metric": key, **self.difference(first, second, key)._asdict()} for key in keys or self.metric_names()]

    def _kinds(self) -> list[str]:
        return [kind for kind in ("in", "ood") if any(domain.ood == (kind == "ood") for domain in self.domains)]

    def _find(self, model: str, key: str) -> tuple[Array, list[Domain], bool]:
        """The `(seeds, questions)` that a metric reads, its domains, and whether their questions are pooled."""
        if model not in self.scores:
            raise UnknownNameError("model", model, self.scores)
        if key not in self.metric_names():
            raise UnknownNameError("metric", key, self.metric_names())
        if "/" in key:
            name, measure = key.rsplit("/", 1)
            return self.scores[model][measure], [domain for domain in self.domains if domain.name == name], False
        measure, kind, *pooled = key.split("_")
        return (
            self.scores[model][measure],
            [domain for domain in self.domains if domain.ood == (kind == "ood")],
            bool(pooled),
        )

    def _resample(self, model: str, key: str) -> Array:
        """`(RESAMPLES, seeds)` of a metric over drawn documents."""
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


def expert_loads(routing: "Mapping[str, RoutingOutput]", owners: Sequence[int], count: int) -> dict[str, Array]:
    """How much each expert did for each example: its weights, summed over the example's real tokens.

    Sum over the batches for all examples. A token in two overlapping windows counts in both.

    Args:
        routing: By layer, of one batch; `sample_index` names the batch's row of each token.
        owners: The example of each row of the batch.
        count: Number of examples.

    Returns:
        `(count, E)` by layer.

    Raises:
        ValueError: The routing does not say which row a token is of.
    """
    loads = {}
    for layer, decided in routing.items():
        if decided.sample_index is None:
            raise ValueError(f"The routing of {layer!r} has no sample_index: pass it to the layer.")
        weights, rows = decided.dense_weight().detach().double().cpu().numpy(), decided.sample_index.cpu().numpy()
        real = slice(None) if decided.mask is None else decided.mask.cpu().numpy()
        loads[layer] = np.zeros((count, weights.shape[1]))
        np.add.at(loads[layer], np.asarray(owners)[rows[real]], weights[real])
    return loads


def expert_shares(loads: Mapping[str, Array], domains: Sequence[str]) -> dict[str, dict[str, Array]]:
    """Which experts work for which domain.

    Args:
        loads: `(examples, E)` by layer, of `expert_loads`.
        domains: Of each example.

    Returns:
        By layer and domain, in the order of the examples: `(E,)` shares of the domain's weights, which sum to 1.

    Raises:
        ValueError: A domain has no weight in a layer.
    """
    names, of = _number(domains)
    shares = {}
    for layer, load in loads.items():
        totals = _totals(load, of, len(names))
        if not totals.any(axis=1).all():
            idle = names[int(totals.any(axis=1).argmin())]
            raise ValueError(f"The layer {layer!r} has routed no token of the domain {idle!r}.")
        shares[layer] = dict(zip(names, totals / totals.sum(axis=1, keepdims=True), strict=True))
    return shares


def domain_dependence(
    load: Array, domains: Sequence[str], documents: Sequence[str], permutations: int = 500, seed: int = 0
) -> Dependence:
    """Whether routing follows domains: the mutual information of expert and domain over the entropy of the expert.

    Both are those of a token drawn from a domain that is drawn first, each as likely as another, so that a large domain
    does not outweigh the others. A few documents always differ, so chance is above 0: it is measured by dealing the
    documents out to the domains anew, as many to each as it had.

    Args:
        load: `(examples, E)` of one layer, of `expert_loads`.
        domains: Of each example.
        documents: Of each example; a document of several domains counts as one in each.
        permutations: How often chance is tried.
        seed: Of the permutations.
    """
    names = list(dict.fromkeys(domains))
    pairs, of_pair = _number(list(zip(domains, documents, strict=True)))
    by_document = _totals(load, of_pair, len(pairs))
    domain_of = np.array([names.index(domain) for domain, _ in pairs])
    found = _explained(_totals(by_document, domain_of, len(names)))
    random = np.random.default_rng(seed)
    chance = np.array(
        [_explained(_totals(by_document, random.permutation(domain_of), len(names))) for _ in range(permutations)]
    )
    # The observed dealing is one of the possible ones.
    p_value = (1 + (chance >= found).sum()) / (1 + permutations)
    return Dependence(found, float(chance.mean()), float(p_value))


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
    count = len(names)
    draws = random.multinomial(count, np.full(count, 1 / count), size=RESAMPLES).astype(np.float64)
    return Domain(name, ood, questions, documents, draws if count > 1 else draws * np.nan)


def _number(labels: Iterable[Any]) -> tuple[list[Any], Places]:
    """The different labels in their order, and the position there of each."""
    places: dict[Any, int] = {}
    numbers = [places.setdefault(label, len(places)) for label in labels]
    return list(places), np.array(numbers, dtype=np.intp)


def _totals(rows: Array, groups: Places, count: int) -> Array:
    """`(count, columns)` sums of the rows of each group."""
    totals = np.zeros((count, rows.shape[1]))
    np.add.at(totals, groups, rows)
    return totals


def _explained(table: Array) -> float:
    """Share of the columns' entropy that the rows explain, all rows as likely; 0 where one column has everything."""
    shares = table / table.sum(axis=1, keepdims=True)
    whole = _entropy(shares.mean(axis=0))
    return 1 - float(np.mean([_entropy(row) for row in shares])) / whole if whole else 0.0


def _entropy(shares: Array) -> float:
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum())


def _draw_seeds(resampled: Array, random: np.random.Generator) -> Array:
    """`(RESAMPLES,)` means over as many drawn seeds as there are, of `(RESAMPLES, seeds)`."""
    seeds = random.integers(resampled.shape[1], size=resampled.shape)
    return np.take_along_axis(resampled, seeds, axis=1).mean(axis=1)


def _interval(mean: float, resampled: Array) -> Interval:
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Interval(float(mean), float(low), float(high))
