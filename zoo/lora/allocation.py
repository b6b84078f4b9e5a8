"""How many experts each layer of a network has."""

from collections.abc import Sequence

from torch import nn

from zoo.moe.designs import per_layer

# A named pattern is one number for each of four equal blocks of layers, from the input to the output.
BLOCKS = 4

Allocation = int | str | Sequence[int]


def check_allocation(experts: Allocation) -> None:
    """Raise a `ValueError` for what can be an allocation of no network; see `experts_at`."""
    numbers = parse_pattern(experts) if isinstance(experts, str) else experts
    numbers = [numbers] if isinstance(numbers, int) else list(numbers)
    if not numbers or any(not isinstance(number, int) or number < 1 for number in numbers):
        raise ValueError(f"experts={experts!r}: every layer needs one expert or more.")


def parse_pattern(pattern: str) -> list[int]:
    """The numbers of a named pattern such as `"2-4-6-8"`.

    Raises:
        ValueError: It is not four numbers with dashes between them.
    """
    numbers = pattern.split("-")
    if len(numbers) != BLOCKS or not all(number.isdecimal() for number in numbers):
        raise ValueError(
            f"experts={pattern!r}: a pattern is {BLOCKS} numbers such as '2-4-6-8', one for each quarter of the "
            "layers. Give a list of one number per layer, such as [2, 3, 4, 6, 7, 8], or one number for all."
        )
    return [int(number) for number in numbers]


def experts_at(experts: Allocation, model: nn.Module, key: str) -> int:
    """The number of experts of one module.

    Args:
        experts: One number for all modules; a named pattern for four equal blocks of layers, from the input to the
            output, as MoLA (Gao et al. 2024, arXiv 2402.08562) writes it; or a list of one number per layer.
        model: The network.
        key: Dotted name of the module.

    Raises:
        ValueError: The module lies in no layer, or the depth does not fit.
    """
    if isinstance(experts, int):
        return experts
    place = find_layer(model, key)
    if place is None:
        raise ValueError(
            f"experts={experts!r} gives a number to each layer, but {key!r} lies in none. "
            f"Leave it out by exclude_modules=[{key!r}], or give one number for all."
        )
    layer, num_layers = place
    if not isinstance(experts, str):
        return per_layer(experts, num_layers)[layer]
    if num_layers % BLOCKS:
        raise ValueError(
            f"experts={experts!r} needs {BLOCKS} equal blocks, but {key!r} lies in a stack of {num_layers} layers. "
            f"Give a list of {num_layers} numbers."
        )
    return parse_pattern(experts)[layer * BLOCKS // num_layers]


def find_layer(model: nn.Module, key: str) -> tuple[int, int] | None:
    """The layer that a module lies in: its index in the outermost `nn.ModuleList` on the way to it, and their number.

    Args:
        model: The network.
        key: Dotted name of one of its modules.

    Returns:
        None where no list is on the way (poolers, heads).
    """
    module = model
    for name in key.split("."):
        if isinstance(module, nn.ModuleList):
            return int(name), len(module)
        module = module.get_submodule(name)
    return None
