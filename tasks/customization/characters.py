"""The classes of EMNIST: 62 are stored, accuracy is measured on the 47 merged ones.

ByMerge (Cohen et al. 2017, section II-B) merges c i j k l m o p s u v w x y z into their upper-case forms, since the
two cannot be told apart without context.
"""

import re

import torch
from torch import Tensor

CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
MERGED_CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt"

_MERGED_OF = torch.tensor(
    [MERGED_CHARACTERS.index(c) if c in MERGED_CHARACTERS else MERGED_CHARACTERS.index(c.upper()) for c in CHARACTERS]
)


def merge(labels: Tensor) -> Tensor:
    """Map labels of the 62 classes to the 47 merged ones.

    Args:
        labels: int64 in 0..61, any shape.
    """
    return _MERGED_OF[labels]


def folder_name(label: int) -> str:
    """The folder of a class, a name that survives file systems without case: `digit_0`, `upper_A`, `lower_a`."""
    character = CHARACTERS[label]
    kind = "digit" if character.isdigit() else "upper" if character.isupper() else "lower"
    return f"{kind}_{character}"


def label_of_folder(name: str) -> int:
    """The label of a class folder.

    Raises:
        ValueError: The name is none of the 62.
    """
    match = re.fullmatch(r"(digit)_([0-9])|(upper)_([A-Z])|(lower)_([a-z])", name)
    if match is None:
        raise ValueError(
            f"Folder {name!r} names no class. Allowed: digit_0..digit_9, upper_A..upper_Z, lower_a..lower_z."
        )
    return CHARACTERS.index(name[-1])
