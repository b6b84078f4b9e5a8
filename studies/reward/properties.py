"""A reward without any network: a logistic regression on what can be counted of two answers, one for each group."""

from collections.abc import Mapping, Sequence

import numpy as np
from sklearn.linear_model import LogisticRegression

from tasks.reward.capabilities import CAPABILITIES, capability_differences
from tasks.reward.examples import Pair
from zoo.comparison import Array


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
            model = LogisticRegression(fit_intercept=False)
            # Each pair both ways round, or all would be of one class.
            model.fit(np.concatenate([own, -own]), np.repeat([1, 0], len(own)))
            found[groups[1] == group] = asked[groups[1] == group] / scale @ model.coef_[0]
    return found
