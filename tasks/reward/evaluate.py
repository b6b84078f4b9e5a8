"""How often a reward model agrees with people, by category and with intervals; routing; a baseline without parameters.

Consistency (Quan 2024) is the share of pairs whose chosen answer has the higher reward, in percent; a tie counts half.
Pairs that share a prompt are not independent, and neither are runs that share data: intervals are bootstraps over
prompts and seeds, and two models are compared on the same prompts.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from zoo.comparison import Array, Comparison, Row, draw

if TYPE_CHECKING:
    from tasks.reward.examples import Pair

PERCENT = 100
POOLED, BALANCED = "consistency", "consistency_length_balanced"

Places = NDArray[np.intp]


def agreement(differences: Array) -> Array:
    """100 where the chosen answer's reward is higher, 0 where it is lower, 50 for a tie.

    Args:
        differences: Reward of the chosen answer less that of the rejected one, any shape.

    Raises:
        ValueError: One is not a number, which would count as wrong.
    """
    if np.isnan(differences).any():
        raise ValueError(f"{int(np.isnan(differences).sum())} of {differences.size} rewards are not a number.")
    return PERCENT * (1 + np.sign(differences)) / 2


def length_differences(pairs: "Sequence[Pair]") -> Array:
    """By how many characters the chosen answer is the longer one, `(n,)`: the rewards of picking the longer answer."""
    return np.array([len(pair.chosen) - len(pair.rejected) for pair in pairs], dtype=np.float64)


def length_balanced(lengths: Array, categories: Sequence[str], seed: int = 0) -> Places:
    """Positions of a subset in which picking the longer answer is right in exactly half of each category's pairs.

    Of each category are kept as many pairs whose longer answer was chosen as pairs whose shorter one was: all of the
    smaller kind, and so many of the other, drawn at random. Pairs of equally long answers are left out.

    Args:
        lengths: `length_differences`.
        categories: Of each pair.
        seed: Draws them.
    """
    generator = np.random.default_rng(seed)
    names = np.array(categories, dtype=object)
    kept: list[Places] = []
    for name in dict.fromkeys(categories):
        sides = [np.flatnonzero((names == name) & (np.sign(lengths) == sign)) for sign in (1, -1)]
        count = min(map(len, sides))
        kept += [generator.permutation(side)[:count] for side in sides]
    return np.sort(np.concatenate(kept))


def confusion_matrix(wanted: Sequence[int], found: Sequence[int], count: int) -> NDArray[np.int64]:
    """How many prompts of each group (rows) were sent to each inner model (columns), `(count, count)`.

    Args:
        wanted: The group of each prompt.
        found: The inner model it was sent to.
        count: How many there are.
    """
    matrix = np.zeros((count, count), dtype=np.int64)
    np.add.at(matrix, (np.asarray(wanted), np.asarray(found)), 1)
    return matrix


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Report(Comparison):
    """Several models on the same pairs; intervals are over prompts, and NaN where there is a single one.

    Its metrics are `consistency` over all pairs, `consistency_length_balanced` over the subset of `length_balanced`,
    `<goal>/consistency` and `<category>/consistency`. Where the subset is empty its metric is missing.

    Attributes:
        subsets: Positions of the pairs of each metric.
        prompts: `(n,)` number of each pair's prompt.
        draws: `(RESAMPLES, prompts)` how often each is drawn.
        scores: By model `(seeds, n)` of `agreement`.
        goals: Names of the goals.
    """

    subsets: dict[str, Places]
    prompts: Places
    draws: Array
    scores: dict[str, Array]
    goals: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        categories: Sequence[str],
        prompts: Sequence[int] | Places,
        lengths: Array,
        differences: Mapping[str, Array],
        goals: Mapping[str, Sequence[str]] | None = None,
    ) -> "Report":
        """Bring runs together.

        Args:
            categories: Of n pairs.
            prompts: The number of each pair's prompt, from 0.
            lengths: `length_differences` of the pairs.
            differences: Rewards of chosen less rejected answers by model, `(n,)` or `(seeds, n)`.
            goals: Categories to be taken together, by a name.

        Raises:
            ValueError: There is no pair, or a model has rewards of other pairs.
        """
        count = len(categories)
        if not count:
            raise ValueError("There are no pairs to report on.")
        stacked = {name: np.atleast_2d(values) for name, values in differences.items()}
        for name, values in stacked.items():
            if values.shape[1] != count:
                raise ValueError(f"The rewards of {name!r} are of {values.shape[1]} pairs; there are {count}.")
        names = np.array(categories, dtype=object)
        subsets = {POOLED: np.arange(count), BALANCED: length_balanced(lengths, categories)}
        for goal, members in (goals or {}).items():
            subsets[f"{goal}/{POOLED}"] = np.flatnonzero(np.isin(names, list(members)))
        for category in dict.fromkeys(categories):
            subsets[f"{category or 'unknown'}/{POOLED}"] = np.flatnonzero(names == category)
        numbers = np.asarray(prompts, dtype=np.intp)
        return cls(
            {name: places for name, places in subsets.items() if len(places)},
            numbers,
            draw(int(numbers.max()) + 1, np.random.default_rng(0)),
            {name: agreement(values) for name, values in stacked.items()},
            tuple(goals or ()),
        )

    def names(self) -> Collection[str]:
        """The models."""
        return self.scores

    def metric_names(self) -> list[str]:
        """Names of the metrics."""
        return list(self.subsets)

    def main_names(self) -> list[str]:
        """All but those of single categories."""
        return [key for key in self.subsets if "/" not in key or key.rpartition("/")[0] in self.goals]

    def values(self, model: str, key: str) -> Array:
        """As `Comparison.values`."""
        self.check(model, key)
        means: Array = self.scores[model][:, self.subsets[key]].mean(axis=1)
        return means

    def resample(self, model: str, key: str) -> Array:
        """As `Comparison.resample`; NaN where none of a metric's prompts was drawn."""
        self.check(model, key)
        scores, places = self.scores[model], self.subsets[key]
        numbers, total = self.prompts[places], self.draws.shape[1]
        if len(np.unique(numbers)) < 2:
            return np.full((len(self.draws), len(scores)), np.nan)
        sums = np.zeros((total, len(scores)))
        np.add.at(sums, numbers, scores[:, places].T)
        counts = self.draws @ np.bincount(numbers, minlength=total)[:, None]
        with np.errstate(invalid="ignore"):
            found: Array = self.draws @ sums / counts
        return found

    def interval_rows(self, model: str) -> list[Row]:
        """A model metric by metric: number of pairs and prompts, and the interval."""
        return [
            {
                "metric": key,
                "pairs": len(places),
                "prompts": len(np.unique(self.prompts[places])),
                **self.interval(model, key)._asdict(),
            }
            for key, places in self.subsets.items()
        ]
