"""What can be counted of two answers, without any network: a reward, and which properties are worth an expert.

    python -m studies.reward.properties      leave out one property after another, by training pairs alone

A reward is a logistic regression for each group of categories.
"""

import argparse
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from studies.reward.methods import CAPABILITIES as CHOSEN
from studies.reward.methods import GROUPS
from studies.rows import Row
from tasks.reward.backbone import stack_names
from tasks.reward.capabilities import CAPABILITIES, PREFERENCE_ITSELF, capability_differences, capability_preferences
from tasks.reward.data import RewardDataModule, number_prompts
from tasks.reward.examples import Pair
from zoo.comparison import Array
from zoo.report import print_table

FOLDS = 4
# Inverse weight of the squared weights, where properties are compared.
STRENGTH = 0.1
# Of a property in which no pair differs.
LEAST_SCALE = 1e-6


def learn(differences: Array, strength: float = 1.0) -> Array:
    """The weights `(C,)` by which differences `(n, C)` of chosen and rejected answers tell which is which."""
    model = LogisticRegression(C=strength, fit_intercept=False)
    # Each pair both ways round, or all would be of one class.
    model.fit(np.concatenate([differences, -differences]), np.repeat([1, 0], len(differences)))
    found: Array = model.coef_[0]
    return found


def regress(learned: Sequence[Pair], scored: Sequence[Pair], group_of: Mapping[str, int]) -> Array:
    """By how much the chosen answers are better, `(n,)`, by weights that the group's pairs teach.

    The group of a pair is that of its category, which no router has to find: what reads texts has no such help.

    Args:
        learned: Pairs to learn from.
        scored: n pairs to be scored.
        group_of: The group of each category; categories without one are a group of their own.
    """
    names = list(CAPABILITIES)
    known, asked = capability_differences(learned, names), capability_differences(scored, names)
    # Properties differ in their units; all weights are held small alike.
    scale = known.std(axis=0)
    scale[scale == 0] = 1
    found = np.zeros(len(scored))
    groups = [np.array([group_of.get(pair.category, -1) for pair in pairs]) for pairs in (learned, scored)]
    for group in np.unique(groups[1]):
        own = known[groups[0] == group] / scale
        if len(own):
            found[groups[1] == group] = asked[groups[1] == group] / scale @ learn(own)
    return found


def held_out_loss(signs: Array, groups: NDArray[np.intp], folds: NDArray[np.intp]) -> float:
    """The mean loss on each fold of what the same group's pairs of the other folds teach.

    Args:
        signs: `(n, C)`, which answer of each pair has more of each property.
        groups: `(n,)`.
        folds: `(n,)`.
    """
    losses = []
    for group in np.unique(groups):
        for fold in np.unique(folds):
            out = (groups == group) & (folds == fold)
            weights = learn(signs[(groups == group) & (folds != fold)], STRENGTH)
            losses.append(np.logaddexp(0, -signs[out] @ weights))
    return float(np.concatenate(losses).mean())


def drop_least(pairs: Sequence[Pair], names: Sequence[str], group_of: Mapping[str, int], keep: int) -> list[Row]:
    """Leave out the property that is missed least, one after another: a line for each, with the loss without it.

    Args:
        pairs: Those to learn from.
        names: Properties.
        group_of: The group of each category.
        keep: How many are kept.
    """
    signs = capability_preferences(pairs, names).astype(np.float64)
    signs /= np.maximum(signs.std(axis=0), LEAST_SCALE)
    groups = np.array([group_of[pair.category] for pair in pairs])
    # Pairs of a prompt stay together.
    folds = number_prompts(pairs) % FOLDS
    kept = list(range(len(names)))
    lines: list[Row] = [{"left out": "nothing", "loss": held_out_loss(signs, groups, folds)}]
    while len(kept) > keep:
        losses = {
            one: held_out_loss(signs[:, [other for other in kept if other != one]], groups, folds) for one in kept
        }
        least = min(losses, key=lambda one: losses[one])
        kept.remove(least)
        lines.append({"left out": names[least], "loss": losses[least]})
    return lines


def main(arguments: Sequence[str] | None = None) -> list[str]:
    """Print in which order properties are left out until as many are left as the study has; return these."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="preference", choices=["preference", "generated"])
    options = parser.parse_args(arguments)
    pairs = RewardDataModule(source=options.source).read("train")
    groups = GROUPS if options.source == "preference" else {pair.category: [pair.category] for pair in pairs}
    names = [name for name in CAPABILITIES if name != "length"]
    lines = drop_least(pairs, names, stack_names(groups), len(CHOSEN) - (PREFERENCE_ITSELF in CHOSEN))
    print_table(f"Loss of a regression on what is counted, on held-out folds of {len(pairs)} pairs", lines)
    dropped = {line["left out"] for line in lines}
    return [name for name in names if name not in dropped]


if __name__ == "__main__":
    main()
