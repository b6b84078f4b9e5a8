"""A causal model on this machine as a judge of answers: the odds of two letters say which one is better.

It judges without being trained for it. It serves as a labeller of capabilities (`tasks.reward.labelling.label_pairs`),
and, asked in both orders, as a baseline that reward models are compared with.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch

from tasks.reward.capabilities import PREFERENCE_ITSELF
from tasks.reward.examples import Pair
from tasks.reward.labelling import ASPECTS, Answer, Ask, in_words
from zoo.base_models import SMOLLM2, load_causal, load_tokenizer
from zoo.errors import UnknownNameError

# What people were asked for, beside the single capabilities.
OVERALL = {PREFERENCE_ITSELF: "is the one that people would rather have: more helpful, honest and harmless"}
LETTERS = ("A", "B")


class CausalJudge:
    """A causal language model, asked by its chat template; without one the question is plain text.

    Attributes:
        descriptions: What the better answer does, by capability.
    """

    def __init__(
        self,
        base: str = SMOLLM2,
        base_sha256: str | None = None,
        descriptions: Mapping[str, str] | None = None,
        max_prompt: int = 800,
        max_answer: int = 800,
    ) -> None:
        """Load the model.

        Args:
            base: A folder, a name on the hub, or a package; see `zoo.base_models.find_base_model`.
            base_sha256: What its weights must be; None allows any.
            descriptions: Further capabilities, or other words for those that are known.
            max_prompt: Characters of a prompt, of which the last ones are shown.
            max_answer: Characters of an answer, of which the first ones are shown.

        Raises:
            DataNotFoundError: The base is nowhere, or what reads it is not installed.
            CheckpointError: It has other weights.
            ValueError: Its tokenizer does not tell the two letters apart.
        """
        self.model = load_causal(base, base_sha256).requires_grad_(False)
        self.tokenizer = load_tokenizer(base)
        self.base = base
        self.descriptions = {**ASPECTS, **OVERALL, **(descriptions or {})}
        self.max_prompt = max_prompt
        self.max_answer = max_answer
        before = "" if self.tokenizer.chat_template else " "
        self.letters = [self.tokenizer(before + letter, add_special_tokens=False)["input_ids"][0] for letter in LETTERS]
        if self.letters[0] == self.letters[1]:
            raise ValueError(f"The tokenizer of {base!r} does not tell {' from '.join(LETTERS)}: choose another base.")

    def __call__(self, prompt: str, first: str, second: str, capability: str) -> Answer:
        """Which answer is better in a capability: a `Labeller`."""
        odds = self.log_odds(Ask(prompt, first, second, capability))
        return "first" if odds > 0 else "second" if odds < 0 else "tie"

    def identity(self, capability: str) -> str:
        """All that an answer depends on beside the texts."""
        words = in_words(Ask("", "", "", capability), self.what(capability))
        return json.dumps([self.base, words, self.max_prompt, self.max_answer])

    def what(self, capability: str) -> str:
        """What the better answer does.

        Raises:
            UnknownNameError: There is no such capability.
        """
        if capability not in self.descriptions:
            raise UnknownNameError("capability", capability, self.descriptions, "Describe one of your own.")
        return self.descriptions[capability]

    @torch.no_grad()
    def log_odds(self, ask: Ask) -> float:
        """The logarithm of how much likelier the first answer is called the better one than the second.

        Args:
            ask: The question.

        Raises:
            UnknownNameError: There is no such capability.
        """
        cut = Ask(
            ask.prompt[-self.max_prompt :],
            ask.first.strip()[: self.max_answer],
            ask.second.strip()[: self.max_answer],
            ask.capability,
        )
        ids = torch.tensor([self.tokens(in_words(cut, self.what(ask.capability)))])
        logits = self.model(input_ids=ids, logits_to_keep=1).logits[0, -1, self.letters]
        return float(logits[0] - logits[1])

    def tokens(self, messages: list[dict[str, Any]]) -> list[int]:
        """Tokens of a question, up to where the letter follows."""
        if self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        else:
            text = "\n\n".join(message["content"] for message in messages) + "\nAnswer:"
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def both_orders(self, pair: Pair, capability: str = PREFERENCE_ITSELF) -> tuple[float, float]:
        """By how much the chosen answer is called the better one, shown first and shown second.

        Their mean is free of what the judge thinks of the places as such; signs that differ say that it is of two
        minds.

        Args:
            pair: The answers.
            capability: In which one; by default, what people prefer.
        """
        first = self.log_odds(Ask(pair.prompt, pair.chosen, pair.rejected, capability))
        second = -self.log_odds(Ask(pair.prompt, pair.rejected, pair.chosen, capability))
        return first, second
