"""Best-of-n: how the true quality of the answer that a reward model picks changes with the number it picks from.

A proxy reward picks one of n answers, a gold reward judges it (Gao, Schulman and Hilton 2022, arXiv 2210.10760). Where
the gold reward falls while the proxy's rises, the proxy is over-optimised.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from zoo.comparison import Array, Interval, bounds, draw


class Curve(NamedTuple):
    """Rewards of the answers that a proxy picks.

    Attributes:
        n: `(points,)` from how many it picks.
        kl: `(points,)` how far the picking is from the policy, in nats, see `kl_of`.
        gold: `(points,)` mean gold reward of what is picked.
        proxy: `(points,)` mean proxy reward.
        low: `(points,)` lower end of the 95 % interval of `gold` over prompts.
        high: Upper end.
    """

    n: NDArray[np.intp]
    kl: Array
    gold: Array
    proxy: Array
    low: Array
    high: Array


def kl_of(n: int) -> float:
    """KL divergence of best-of-n from the policy, in nats: `ln n - (n - 1) / n`."""
    return math.log(n) - (n - 1) / n


def expected_best(proxy: Array, values: Array, n: int) -> float:
    """The expected value of the answer with the highest proxy reward among n of N, drawn without replacement.

    Unbiased for n answers of the policy (Nakano et al. 2021, arXiv 2112.09332, appendix I): sorted by the proxy, the
    i-th of N (from 1) is the best of `C(i - 1, n - 1)` of the `C(N, n)` sets. Among answers of equal proxy reward one
    is picked at random, so that each of them counts as their mean.

    Args:
        proxy: `(N,)` by which is picked.
        values: `(N,)` whose expectation is wanted.
        n: At most N.

    Raises:
        ValueError: n is not from 1 to N.
    """
    total = len(proxy)
    if not 1 <= n <= total:
        raise ValueError(f"n={n}: must be from 1 to the number of answers, {total}.")
    _, tied, counts = np.unique(proxy, return_inverse=True, return_counts=True)
    means = np.bincount(tied, weights=values) / counts
    ranks = np.arange(1, total + 1)
    weights = np.array([math.comb(rank - 1, n - 1) for rank in ranks], dtype=np.float64) / math.comb(total, n)
    return float(weights @ means[np.sort(tied)])


def picked(proxy: Array, values: Array, sizes: Sequence[int]) -> Array:
    """The expected values of what a proxy picks for a prompt, `(sizes,)`, the mean over its runs.

    Args:
        proxy: `(N,)`, or `(seeds, N)`.
        values: The same shape.
        sizes: The n.
    """
    runs = list(zip(np.atleast_2d(proxy), np.atleast_2d(values), strict=True))
    return np.array([np.mean([expected_best(by, of, n) for by, of in runs]) for n in sizes])


def best_of_n_curve(proxy: Sequence[Array], gold: Sequence[Array], sizes: Sequence[int], seed: int = 0) -> Curve:
    """The curve over prompts, all of which have enough answers for the largest n.

    Args:
        proxy: For each prompt `(N,)` rewards of its answers, or `(seeds, N)` those of several runs, whose picks count
            as their mean; N may differ.
        gold: For each prompt `(N,)` gold rewards.
        sizes: The n.
        seed: Of the bootstrap over prompts.

    Raises:
        ValueError: There is no prompt, or one has fewer answers than the largest n.
    """
    fewest = min((len(of) for of in gold), default=0)
    if fewest < max(sizes):
        raise ValueError(f"sizes={list(sizes)}: a prompt has only {fewest} answers ({len(proxy)} prompts).")
    golds = np.array([picked(by, np.broadcast_to(of, by.shape), sizes) for by, of in zip(proxy, gold, strict=True)])
    proxies = np.array([picked(by, by, sizes) for by in proxy])
    low, high = np.transpose([mean_over_prompts(of, seed)[1:] for of in golds.T])
    kl = np.array([kl_of(n) for n in sizes])
    return Curve(np.array(sizes, dtype=np.intp), kl, golds.mean(axis=0), proxies.mean(axis=0), low, high)


def mean_over_prompts(values: Array, seed: int = 0) -> Interval:
    """The mean of one value per prompt, `(prompts,)`, with its 95 % interval over prompts.

    Args:
        values: Of each prompt, e.g. by how much one pick is better than another.
        seed: Of the bootstrap.
    """
    drawn = draw(len(values), np.random.default_rng(seed)) @ values / len(values)
    return Interval(float(values.mean()), *bounds(drawn))
