"""Measurable properties of answers, which stand in for the capabilities of DMoERM where no model judges them.

The paper asks a large language model which of two answers is better in a capability such as empathy or logic. What is
here is counted instead: words, phrases and marks. The names say what is counted, and no more is claimed. Words are runs
of letters and digits, and the lists of words are English.

Source of capabilities as such: Quan, "DMoERM: Recipes of Mixture-of-Experts for Effective Reward Modeling", 2024.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from tasks.reward.examples import Pair
from zoo.errors import UnknownNameError

# A capability that is no property of an answer, but what people prefer: its expert learns nothing and stays the task
# model, so that what that says is combined with the others. A further pass over the same pairs made it no better.
PREFERENCE_ITSELF = "preference"
# Characters in which an answer declines, if it does.
OPENING = 200
# Shorter words say little of what a text is about.
MIN_CONTENT = 3
# Words of that many characters are long.
LONG = 8
# Prompts that are kept cut up, since pairs that share one stand together; and answers whose scores are, since one is in
# several pairs, which are counted in every run of a study.
KEPT_PROMPTS, KEPT_ANSWERS = 64, 1 << 16

WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")
SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)|\n+")
# What a capital or a digit means at the start of a sentence or line is not known: the word before has to say.
NAME_OR_NUMBER = re.compile(r"(?<=[a-z,;:] )(?:[A-Z]\w*|\d+(?:[.,]\d+)*)")
LIST_ITEM = re.compile(r"^[ \t]*(?:[-*+\u2022]|\d{1,3}[.)])[ \t]", re.MULTILINE)
HEADING = re.compile(r"^#{1,6} ", re.MULTILINE)
PARAGRAPH_END = re.compile(r"\n\s*\n")
ENDED = re.compile(r"[.!?\u2026:\"'\u201d\u2019)\]}`*|]$")
DECLINED = re.compile(
    r"\b(?:sorry|apologi[sz]e|can(?:['\u2019]t| ?not)|won['\u2019]t|will not|wouldn['\u2019]t|would not|not okay|"
    r"against my|(?:unable|not able|not going|not appropriate|not comfortable) to|"
    r"as an? (?:ai|large language model|language model))\b",
    re.IGNORECASE,
)

FUNCTION = """
about above after again against all also and any are because been before being below between both but can could did
does doing during each few for from further had has have having her here hers him his how into its just more most
nor not off once only other our ours out over own same she should some such than that the their theirs them then
there these they this those through too under until very was were what when where which while who whom why will
with would you your yours
"""
FUNCTION_WORDS = frozenset(FUNCTION.split())
HEDGING = """
appear appears could generally guess likely may maybe might often perhaps possibly probably seem seems sometimes
typically uncertain unclear unlikely unsure usually
"""
HEDGES = frozenset(HEDGING.split())
POLITE = """
apologies apologise apologize appreciate glad happy hope please pleasure sorry thank thanks understand welcome
"""
POLITE_WORDS = frozenset(POLITE.split())
FIRST = "i i'd i'll i'm i've me mine my myself"
FIRST_PERSON = frozenset(FIRST.split())
WARNING = """
abuse consent consequence consequences counselor crime criminal danger dangerous dignity discrimination ethical
harm harmful harms hate help hotline hurt illegal illegally inappropriate law laws legal offensive police privacy
professional professionals respect respectful responsible responsibly rights risk risks risky safe safely safety
serious severe support therapist unethical unlawful unsafe violence violent wellbeing wrong
"""
WARNING_WORDS = frozenset(WARNING.split())


class Text:
    """A prompt or an answer; each way of cutting it up is done once, when it is first asked for."""

    def __init__(self, text: str) -> None:
        """Strip it: space at the ends tells which program wrote an answer, not how good it is."""
        self.text = text.strip()

    @cached_property
    def words(self) -> list[str]:
        """In lower case, with straight apostrophes."""
        return WORD.findall(self.text.lower().replace("\u2019", "'"))

    @cached_property
    def content(self) -> frozenset[str]:
        """Different words that are neither short nor function words."""
        return frozenset(word for word in set(self.words) - FUNCTION_WORDS if len(word) >= MIN_CONTENT)

    @cached_property
    def sentences(self) -> int:
        """How many, at least 1; a line ends one too."""
        return max(1, len([part for part in SENTENCE_END.split(self.text) if part.strip()]))

    def count(self, listed: frozenset[str]) -> int:
        """How many of its words are in a list."""
        return sum(word in listed for word in self.words)


@dataclass(frozen=True, slots=True)
class Capability:
    """A property of an answer; more of it counts as better.

    Attributes:
        what: The property, in words.
        margin: Scores that differ by less are a tie.
        measure: The score, of a prompt and an answer.
    """

    what: str
    margin: float
    measure: Callable[[Text, Text], float]

    def score(self, prompt: str, answer: str) -> float:
        """How much of it an answer has; comparable between answers to the same prompt.

        Args:
            prompt: What was asked.
            answer: What is measured.
        """
        return self.measure(_cut_prompt(prompt), Text(answer))


@lru_cache(KEPT_PROMPTS)
def _cut_prompt(prompt: str) -> Text:
    return Text(prompt)


@lru_cache(KEPT_ANSWERS)
def _measure(prompt: str, answer: str) -> tuple[float, ...]:
    """The scores of an answer in all capabilities."""
    asked, given = _cut_prompt(prompt), Text(answer)
    return tuple(one.measure(asked, given) for one in CAPABILITIES.values())


# --- measures --------------------------------------------------------------------------------------------------------


def _length(prompt: Text, answer: Text) -> float:
    return math.log1p(len(answer.words))


def _new_words(prompt: Text, answer: Text) -> float:
    return math.log1p(len(answer.content - prompt.content))


def _prompt_overlap(prompt: Text, answer: Text) -> float:
    return len(prompt.content & answer.content) / max(1, len(prompt.content))


def _no_repetition(prompt: Text, answer: Text) -> float:
    words = answer.words
    count = len(words) - 2
    return len(set(zip(words, words[1:], words[2:], strict=False))) / count if count > 0 else 1.0


def _formatting(prompt: Text, answer: Text) -> float:
    text = answer.text
    counts = (
        len(LIST_ITEM.findall(text)),
        len(HEADING.findall(text)) + text.count("**") // 2,
        text.count("```") // 2,
        len(PARAGRAPH_END.findall(text)),
    )
    return sum(map(math.log1p, counts))


def _names_and_numbers(prompt: Text, answer: Text) -> float:
    return math.log1p(len(set(NAME_OR_NUMBER.findall(answer.text))))


def _short_sentences(prompt: Text, answer: Text) -> float:
    return -math.log1p(len(answer.words) / answer.sentences)


def _few_hedges(prompt: Text, answer: Text) -> float:
    return -answer.count(HEDGES) / max(1, len(answer.words))


def _refusal(prompt: Text, answer: Text) -> float:
    return float(DECLINED.search(answer.text[:OPENING]) is not None)


def _warning_words(prompt: Text, answer: Text) -> float:
    return answer.count(WARNING_WORDS) / max(1, len(answer.words))


def _polite_words(prompt: Text, answer: Text) -> float:
    return math.log1p(answer.count(POLITE_WORDS))


def _emphasis(prompt: Text, answer: Text) -> float:
    return math.log1p(len(HEADING.findall(answer.text)) + answer.text.count("**") // 2)


def _finished(prompt: Text, answer: Text) -> float:
    return float(ENDED.search(answer.text) is not None)


def _long_words(prompt: Text, answer: Text) -> float:
    return sum(len(word) >= LONG for word in answer.words) / max(1, len(answer.words))


def _first_person(prompt: Text, answer: Text) -> float:
    return math.log1p(answer.count(FIRST_PERSON))


# A tenth more or less, of what is measured by its logarithm.
TENTH = math.log(1.1)

CAPABILITIES: Mapping[str, Capability] = {
    "length": Capability("has more words", TENTH, _length),
    "new_words": Capability("has more different content words that the prompt does not have", TENTH, _new_words),
    "prompt_overlap": Capability("takes up a larger share of the prompt's content words", 0.05, _prompt_overlap),
    "no_repetition": Capability("repeats fewer sequences of three words", 0.02, _no_repetition),
    "formatting": Capability("has more lists, headings, bold type, code blocks and paragraphs", 0.5, _formatting),
    "names_and_numbers": Capability("has more different names and numbers", TENTH, _names_and_numbers),
    "short_sentences": Capability("has shorter sentences and lines", TENTH, _short_sentences),
    "few_hedges": Capability("hedges less: fewer of its words are maybe, might, seems ...", 0.005, _few_hedges),
    "refusal": Capability(f"declines in its first {OPENING} characters", 1.0, _refusal),
    "warning_words": Capability("more of its words speak of harm, law, risk and help", 0.01, _warning_words),
    "polite_words": Capability("has more words of politeness", TENTH, _polite_words),
    "emphasis": Capability("has more lines that begin with # and pairs of **", TENTH, _emphasis),
    "finished": Capability("ends with a mark that ends sentences, quotations, brackets or code", 1.0, _finished),
    "long_words": Capability(f"more of its words have at least {LONG} letters", 0.02, _long_words),
    "first_person": Capability("has more words such as I and my", TENTH, _first_person),
}


def capability_differences(pairs: Sequence[Pair], names: Sequence[str]) -> NDArray[np.float64]:
    """How much more of each property the chosen answer of each pair has than the rejected one.

    Args:
        pairs: N of them.
        names: C names in `CAPABILITIES`.

    Returns:
        `(N, C)`, in each property's own unit.

    Raises:
        UnknownNameError: There is no such property.
    """
    if unknown := [name for name in names if name not in CAPABILITIES]:
        raise UnknownNameError("measurable capability", unknown[0], CAPABILITIES)
    asked = list(CAPABILITIES)
    both = [[_measure(pair.prompt, answer) for answer in (pair.chosen, pair.rejected)] for pair in pairs]
    scores = np.array(both, dtype=np.float64).reshape(len(pairs), 2, len(asked))
    found: NDArray[np.float64] = (scores[:, 0] - scores[:, 1])[:, [asked.index(name) for name in names]]
    return found


def capability_preferences(pairs: Sequence[Pair], names: Sequence[str]) -> NDArray[np.int8]:
    """Which answer of each pair has more of each property.

    Args:
        pairs: N of them.
        names: C names in `CAPABILITIES`.

    Returns:
        `(N, C)`: 1 for the chosen answer, -1 for the rejected one, 0 where their scores are closer than the margin.

    Raises:
        UnknownNameError: There is no such property.
    """
    differences = capability_differences(pairs, names)
    clear = np.abs(differences) >= [CAPABILITIES[name].margin for name in names]
    return (np.sign(differences) * clear).astype(np.int8)
