"""Measured properties: what each counts, when it decides, and what people's choices say about the default lists."""

import math
from dataclasses import replace

import numpy as np
import pytest

from tasks.reward.capabilities import (
    CAPABILITIES,
    capability_preferences,
)
from tasks.reward.examples import Pair
from zoo.errors import UnknownNameError

PLAIN = "The cat sat on the mat and looked at the river below the old house."
# For each property an answer that has more of it than PLAIN.
MORE = {
    "length": PLAIN + " Then it sat on the mat.",
    "new_words": "Every spring, hungry kittens explore gardens, chase butterflies, climb fences, and nap under lilacs.",
    "prompt_overlap": "Where do cats sleep, and which animals share their beds?",
    "no_repetition": "One quick fox ran.",
    "formatting": "- The cat sat\n- It **looked** at the river\n\n```\nriver\n```",
    "names_and_numbers": "The cat sat with Anna in Paris for 12 days, and Anna left in 1999.",
    "short_sentences": "The cat sat. It looked. A river ran. A house stood.",
    "few_hedges": "Cats do sleep there.",
    "refusal": "I'm sorry, but I can\u2019t say where cats sleep.",
    "warning_words": "That is dangerous and illegal: respect the law.",
    "polite_words": "Thanks, I am happy to help you with the cat.",
    "emphasis": "# Cats\n\nThe cat sat on the **mat**.",
    "finished": "The cat sat.",
    "long_words": "Apparently domesticated carnivores habitually rest.",
    "first_person": "I think that my cat sleeps with me.",
}
# What MORE is compared with, where PLAIN has none of it to lack.
LESS = {
    "no_repetition": "the cat sat the cat sat the cat sat",
    "few_hedges": "Perhaps cats might sleep there, maybe.",
    "finished": "The cat sat on the mat and",
}
PROMPT = "Where do cats sleep, and which animals share their beds?"


def pairs() -> list[Pair]:
    return [Pair(PROMPT, more, LESS.get(name, PLAIN), "Chat", name) for name, more in MORE.items()]


def test_every_property_prefers_the_answer_that_has_more_of_it() -> None:
    names = list(CAPABILITIES)
    assert names == list(MORE)
    table = capability_preferences(pairs(), names)
    assert table.dtype == np.int8 and table.shape == (len(names), len(names))
    assert (np.diag(table) == 1).all(), dict(zip(names, np.diag(table).tolist(), strict=True))


def test_preferences_follow_from_scores_and_margins() -> None:
    names = ["refusal", "length", "formatting"]
    for row, pair in zip(capability_preferences(pairs(), names), pairs(), strict=True):
        for name, preference in zip(names, row, strict=True):
            one = CAPABILITIES[name]
            difference = one.score(pair.prompt, pair.chosen) - one.score(pair.prompt, pair.rejected)
            assert preference == (0 if abs(difference) < one.margin else math.copysign(1, difference))


def test_swapped_answers_turn_every_sign_and_equal_ones_tie() -> None:
    names = list(CAPABILITIES)
    swapped = [replace(pair, chosen=pair.rejected, rejected=pair.chosen) for pair in pairs()]
    assert (capability_preferences(swapped, names) == -capability_preferences(pairs(), names)).all()
    assert not capability_preferences([replace(pair, rejected=pair.chosen) for pair in pairs()], names).any()


def test_space_around_an_answer_tells_nothing() -> None:
    for name, one in CAPABILITIES.items():
        for answer in MORE.values():
            assert one.score(PROMPT, f" \n\n{answer}\n\n ") == one.score(PROMPT, answer), name


@pytest.mark.parametrize(
    ("name", "answer", "score"),
    [
        ("length", "one two-three it's", math.log(5)),
        ("length", "", 0),
        ("new_words", "Cats sleep in Warm, warm and dry beds; so do I.", math.log(3)),
        ("prompt_overlap", "Cats share beds, beds, beds.", 3 / 5),
        ("no_repetition", "a b c a b c", 3 / 4),
        ("no_repetition", "a b", 1),
        (
            "formatting",
            "# Title\n\n1. one\n2) two\n  * three\n\ntext **bold** 3.5 -4\n```x```",
            math.log(4 * 3 * 2 * 3),
        ),
        ("names_and_numbers", "Old Tom met Ann Lee, Bob and Ann in 1999 with 3.5 kg.\n2. Then", math.log(7)),
        ("short_sentences", "Is 3.5 more? Yes!\nIt is", -math.log1p(7 / 3)),
        ("short_sentences", "", 0),
        ("few_hedges", "It may rain, or perhaps not.", -2 / 6),
        ("refusal", "I cannot do that.", 1),
        ("refusal", "As an AI I have no bed.", 1),
        ("refusal", "Use a can of paint. " * 10 + "Sorry.", 0),
        ("warning_words", "Theft is a crime.", 1 / 4),
        ("polite_words", "Thank you, thanks! I am sorry.", math.log(4)),
        ("emphasis", "# Title\n\n## Part\n\n**bold** and *not*, a # too", math.log(4)),
        ("finished", "It does.", 1),
        ("finished", "`x = 1`\n", 1),
        ("finished", "It does, and so on and", 0),
        ("finished", "", 0),
        ("long_words", "A sentence of absolutely ordinary words", 3 / 6),
        ("first_person", "I say what I\u2019m told; my image is mine. It is.", math.log(5)),
    ],
)
def test_scores_by_hand(name: str, answer: str, score: float) -> None:
    assert CAPABILITIES[name].score(PROMPT, answer) == pytest.approx(score)


def test_every_property_can_measure_anything() -> None:
    for text in ("", " ", "\n\n", "...", "\u4f60\u597d", "**", "```", "\u2019" * 5, "9" * 5000):
        for name, one in CAPABILITIES.items():
            assert math.isfinite(one.score(text, text)), name


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(UnknownNameError, match=r"measurable capability 'formating'. Did you mean 'formatting'"):
        capability_preferences(pairs(), ["length", "formating"])
