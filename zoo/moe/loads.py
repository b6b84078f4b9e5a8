"""Who works for whom: what each expert did for each example, and whether routing follows the groups of examples."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoo.moe.routing import RoutingOutput

Array = NDArray[np.float64]


class Dependence(NamedTuple):
    """How much the group says about the expert.

    Attributes:
        explained: Share of the entropy of the experts that the group explains: 0 where units of all groups go to the
            same experts in the same shares, 1 where the group decides which expert a unit goes to.
        chance: The mean of that if examples are dealt out to the groups at random.
        p_value: How often chance explains as much.
    """

    explained: float
    chance: float
    p_value: float


def expert_loads(routing: Mapping[str, RoutingOutput], owners: Sequence[int] | Tensor, count: int) -> dict[str, Array]:
    """How much each expert did for each example: its weights, summed over the example's real units.

    Args:
        routing: By layer, of one batch; `sample_index` names the batch's row of each unit.
        owners: The example of each row of the batch; on any device.
        count: Number of examples.

    Returns:
        `(count, E)` by layer.

    Raises:
        ValueError: The routing does not say which row a unit is of.
    """
    loads = {}
    for layer, decided in routing.items():
        if decided.sample_index is None:
            raise ValueError(f"The routing of {layer!r} has no sample_index: pass it to the layer.")
        weights, rows = decided.dense_weight().detach().cpu().double(), decided.sample_index.cpu()
        if decided.mask is not None:
            real = decided.mask.cpu()
            weights, rows = weights[real], rows[real]
        places = torch.as_tensor(owners, dtype=torch.long, device="cpu")[rows]
        loads[layer] = weights.new_zeros(count, weights.shape[1]).index_add_(0, places, weights).numpy()
    return loads


def expert_shares(loads: Mapping[str, Array], groups: Sequence[str]) -> dict[str, dict[str, Array]]:
    """Which experts work for which group.

    Args:
        loads: `(examples, E)` by layer, of `expert_loads`.
        groups: Of each example.

    Returns:
        By layer and group, in the order of the examples: `(E,)` shares of the group's weights, which sum to 1.

    Raises:
        ValueError: A group has no weight in a layer.
    """
    names, member = _members(groups)
    shares = {}
    for layer, load in loads.items():
        totals = member @ load
        _require_weight(layer, totals, names)
        shares[layer] = dict(zip(names, totals / totals.sum(axis=1, keepdims=True), strict=True))
    return shares


def group_dependence(
    loads: Mapping[str, Array], groups: Sequence[str], permutations: int = 500, seed: int = 0
) -> dict[str, Dependence]:
    """Whether routing follows groups: the mutual information of expert and group over the entropy of the expert.

    Both are those of a unit drawn from a group that is drawn first, each as likely as another, so that a large group
    does not outweigh the others. A few examples always differ, so chance is above 0: it is measured by dealing the
    examples out to the groups anew, as many to each as it had.

    Args:
        loads: `(examples, E)` by layer, of `expert_loads`; scale an example's row to give it another weight.
        groups: Of each example.
        permutations: How often chance is tried.
        seed: Of the permutations.

    Returns:
        By layer.

    Raises:
        ValueError: A group has no weight in a layer.
    """
    if not loads:
        return {}
    names, member = _members(groups)
    for layer, load in loads.items():
        _require_weight(layer, member @ load, names)
    stacked = np.concatenate(list(loads.values()), axis=1)
    begins = np.cumsum([0, *(load.shape[1] for load in loads.values())])[:-1]
    found = _explained(member @ stacked, begins)
    random = np.random.default_rng(seed)
    chance = np.stack([_explained(random.permutation(member, axis=1) @ stacked, begins) for _ in range(permutations)])
    # The observed dealing is one of the possible ones.
    p_values = (1 + (chance >= found).sum(axis=0)) / (1 + permutations)
    columns = zip(found.tolist(), chance.mean(axis=0).tolist(), p_values.tolist(), strict=True)
    return {layer: Dependence(*column) for layer, column in zip(loads, columns, strict=True)}


def _members(groups: Sequence[str]) -> tuple[list[str], Array]:
    """The groups in their order, and which examples are in each, `(groups, examples)` of 0 and 1."""
    names = list(dict.fromkeys(groups))
    numbers = np.array([names.index(group) for group in groups])
    return names, (np.arange(len(names))[:, None] == numbers).astype(np.float64)


def _require_weight(layer: str, totals: Array, names: Sequence[str]) -> None:
    """Refuse groups without weight: nothing can be said about their experts."""
    if not totals.any(axis=1).all():
        idle = names[int(totals.any(axis=1).argmin())]
        raise ValueError(f"The layer {layer!r} has routed nothing of {idle!r}.")


def _explained(totals: Array, begins: NDArray[np.intp]) -> Array:
    """Share of the columns' entropy that the rows explain, all rows as likely, of tables side by side.

    Args:
        totals: `(groups, columns of all layers)`.
        begins: First column of each layer.

    Returns:
        `(layers,)`; 0 where one column has everything.
    """
    sums = np.add.reduceat(totals, begins, axis=1)
    widths = np.diff([*begins, totals.shape[1]])
    shares = totals / np.repeat(sums, widths, axis=1)
    whole = np.add.reduceat(_entropies(shares.mean(axis=0)), begins)
    within = np.add.reduceat(_entropies(shares).mean(axis=0), begins)
    explained: Array = np.divide(whole - within, whole, out=np.zeros_like(whole), where=whole > 0)
    return explained


def _entropies(probabilities: Array) -> Array:
    """`- p log p` of each number, 0 where it is 0."""
    logs = np.zeros_like(probabilities)
    np.log(probabilities, out=logs, where=probabilities > 0)
    return -probabilities * logs
