"""Which categories share an inner model: thin ones are merged until there are few enough.

    python -m tasks.reward.groups [--root DIR | --file FILE [--columns JSON]] [--most 6] [--least 200]

prints the groups of a training part as a table, and as a line for a config.
"""

import argparse
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np

from tasks.reward.examples import Pair, column_names, prompt_key, read_pairs, read_preference
from zoo.data import find
from zoo.report import print_table

# Below the data root.
PREFERENCE = {
    part: (f"preference/helpful_{part}.parquet", f"preference/harmless_{part}.parquet")
    for part in ("train", "val", "test")
}
# The categories of the development data whose answers are to be harmless.
HARMLESS = ("Harmlessness", "HH-harmless-base")
WORD = re.compile(r"[a-z]+")
HOW_TO_GET_PREFERENCES = (
    "This file is part of the development data; for pairs of your own use source=file with --data.file, for official "
    "data source=hh_rlhf or ultrafeedback; source=generated needs none."
)


def merge_categories(
    pairs: Sequence[Pair], most: int = 6, least: int = 200, apart: Collection[str] = HARMLESS
) -> dict[str, list[str]]:
    """Merge categories until there are few groups, and none with too few pairs.

    The rule: as long as there are more than `most` groups, or one has fewer than `least` pairs, the group with the
    fewest pairs joins the one whose prompts use the most similar words (cosine of the mean TF-IDF of their prompts, so
    that the router can tell groups apart), of those with the same goal: what makes an answer harmless makes it no
    better in a chat. Ties go to the first in alphabetical order. Nothing but the training pairs is looked at.

    Args:
        pairs: Those to learn from.
        most: Inner models.
        least: Pairs that an inner model has to have; one group of each goal is always left.
        apart: The categories of another goal than the rest, which merge with one another alone.

    Returns:
        The categories of each group, the group with the most pairs first; it is named by its largest category.

    Raises:
        ValueError: There is no pair, or `most` is below 1.
    """
    if not pairs or most < 1:
        raise ValueError(f"most={most}: must be at least 1, and there are {len(pairs)} pairs to group.")
    counts = Counter(pair.category for pair in pairs)
    words = category_words(pairs)
    groups = [[category] for category in sorted(counts)]

    def size(group: Sequence[str]) -> int:
        return sum(counts[category] for category in group)

    def partners(group: Sequence[str]) -> list[list[str]]:
        return [other for other in groups if other is not group and (other[0] in apart) == (group[0] in apart)]

    while mergeable := [group for group in groups if partners(group)]:
        smallest = min(mergeable, key=size)
        if len(groups) <= most and size(smallest) >= least:
            break
        own = direction(words, smallest)
        nearest = max(partners(smallest), key=lambda group: float(own @ direction(words, group)))
        nearest += smallest
        groups = [group for group in groups if group is not smallest]
    ordered = sorted(groups, key=size, reverse=True)
    return {max(group, key=lambda name: counts[name]): sorted(group) for group in ordered}


def category_words(pairs: Sequence[Pair]) -> dict[str, np.ndarray]:
    """The summed TF-IDF of each category's prompts, every prompt counted once and made to length 1."""
    prompts = {prompt_key(pair.prompt): pair.category for pair in pairs}
    bags = {prompt: Counter(WORD.findall(prompt)) for prompt in prompts}
    spread = Counter(word for bag in bags.values() for word in bag)
    places = {word: place for place, word in enumerate(spread)}
    sums: dict[str, np.ndarray] = {}
    for prompt, category in prompts.items():
        row = sums.setdefault(category, np.zeros(len(places)))
        weights = {word: count * math.log(len(bags) / spread[word]) for word, count in bags[prompt].items()}
        length = math.hypot(*weights.values()) or 1.0
        for word, weight in weights.items():
            row[places[word]] += weight / length
    return sums


def direction(words: dict[str, np.ndarray], group: Sequence[str]) -> np.ndarray:
    """The mean TF-IDF of a group's prompts, made to length 1."""
    total = np.sum([words[category] for category in group], axis=0)
    length = float(np.linalg.norm(total))
    return total / length if length else total


def main(args: Sequence[str] | None = None) -> None:
    """Print the groups of a training part.

    Args:
        args: Words of the command line; those of the process by default.

    Raises:
        SystemExit: An argument is wrong, or data are missing; the message says what to do.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="the data root; else MOE_ZOO_DATA")
    parser.add_argument("--file", help="pairs of your own")
    parser.add_argument("--columns", type=column_names, help="what the file calls its columns, as --data.columns")
    parser.add_argument("--most", type=int, default=6, help="inner models")
    parser.add_argument("--least", type=int, default=200, help="pairs of one")
    options = parser.parse_args(args)
    try:
        pairs = _read(options)
        groups = merge_categories(pairs, options.most, options.least)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    counts = Counter(pair.category for pair in pairs)
    rows = [
        {
            "inner model": name,
            "pairs": sum(counts[category] for category in categories),
            "categories": ", ".join(f"{category} ({counts[category]})" for category in categories),
        }
        for name, categories in groups.items()
    ]
    print_table(f"{len(counts)} categories in {len(groups)} inner models", rows)
    print(f"groups: {json.dumps(groups)}")


def _read(options: argparse.Namespace) -> list[Pair]:
    """The pairs of the file, or the training part of the development data."""
    if options.file:
        return read_pairs(options.file, options.columns)
    if options.columns:
        raise ValueError("--columns says what the columns of a file are called: name one with --file.")
    paths = [find(options.root, path, HOW_TO_GET_PREFERENCES) for path in PREFERENCE["train"]]
    return [pair for path in paths for pair in read_preference(path)]


if __name__ == "__main__":
    main()
