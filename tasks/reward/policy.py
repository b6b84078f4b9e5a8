"""A real policy for reward models: a causal model that answers prompts, and that learns from the answers they pick.

Best-of-n distillation: of n answers to each prompt the reward model picks one, and LoRA teaches the policy to give such
answers by itself (RAFT, Dong et al. 2023, arXiv 2304.06767).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tasks.reward.backbone import Backbone, Inputs, pool_states
from tasks.reward.data import CandidateDataset
from tasks.reward.examples import Candidate
from tasks.reward.model import category_numbers
from tasks.reward.texts import ANSWER, pad
from zoo.base_models import SMOLLM2, load_causal, load_tokenizer
from zoo.comparison import Array


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer of a policy.

    Attributes:
        prompt: As it was asked.
        answer: In words.
        tokens: What was drawn, the end of the answer included where it came.
    """

    prompt: str
    answer: str
    tokens: list[int]


class Policy:
    """A causal language model that answers prompts, with a LoRA once it is taught."""

    def __init__(self, base: str = SMOLLM2, base_sha256: str | None = None) -> None:
        """Load the model.

        Args:
            base: A folder, a name on the hub, or a package; see `zoo.base_models.find_base_model`.
            base_sha256: What its weights must be; None allows any.

        Raises:
            DataNotFoundError: The base is nowhere, or what reads it is not installed.
            CheckpointError: It has other weights.
        """
        self.model = load_causal(base, base_sha256).requires_grad_(False)
        self.tokenizer = load_tokenizer(base)
        ends = self.model.generation_config.eos_token_id
        self.ends: list[int] = ends if isinstance(ends, list) else [ends]
        # The first of what ends an answer also pads.
        self.end = self.ends[0]
        # Its makers may have set penalties of repetition and the like, which would make others of its probabilities.
        self.model.generation_config = type(self.model.generation_config)(eos_token_id=self.ends)
        self.taught = False

    def ask(self, prompt: str) -> list[int]:
        """Tokens of a prompt, up to where the answer follows."""
        if self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
        else:
            text = prompt + ANSWER
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    @torch.no_grad()
    def sample(self, prompts: Sequence[str], count: int, max_tokens: int = 48, seed: int = 0) -> list[list[Answered]]:
        """Answers drawn at temperature 1 from all tokens, so that their probabilities are the policy's own.

        Args:
            prompts: What is asked, all at once.
            count: How many answers to each.
            max_tokens: Tokens of an answer, which may end before it does.
            seed: Of what is drawn.
        """
        asked = [self.ask(prompt) for prompt in prompts]
        length = max(map(len, asked))
        ids, mask = torch.full((len(asked), length), self.end), torch.zeros(len(asked), length, dtype=torch.long)
        for row, tokens in enumerate(asked):
            ids[row, length - len(tokens) :] = torch.tensor(tokens)
            mask[row, length - len(tokens) :] = 1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            drawn = self.model.generate(
                ids,
                attention_mask=mask,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=max_tokens,
                num_return_sequences=count,
                pad_token_id=self.end,
            )
        rows = drawn[:, length:].tolist()
        return [
            [self.answered(prompt, row) for row in rows[place * count : (place + 1) * count]]
            for place, prompt in enumerate(prompts)
        ]

    def answered(self, prompt: str, tokens: list[int]) -> Answered:
        """An answer of its tokens, without padding."""
        places = [place for place, token in enumerate(tokens) if token in self.ends]
        tokens = tokens[: places[0] + 1] if places else tokens
        return Answered(prompt, self.tokenizer.decode(tokens, skip_special_tokens=True).strip(), tokens)

    def log_likelihoods(self, answers: Sequence[Answered]) -> Tensor:
        """The log-probability of each answer after its prompt, summed over its tokens, `(B,)`."""
        asked = [self.ask(one.prompt) for one in answers]
        length = max(len(prompt) + len(one.tokens) for prompt, one in zip(asked, answers, strict=True))
        ids = torch.full((len(answers), length), self.end)
        counted, real = (torch.zeros(len(answers), length, dtype=torch.bool) for _ in range(2))
        for row, (prompt, one) in enumerate(zip(asked, answers, strict=True)):
            size = len(prompt) + len(one.tokens)
            ids[row, :size] = torch.tensor(prompt + one.tokens)
            counted[row, len(prompt) : size] = True
            real[row, :size] = True
        logits = self.model(input_ids=ids, attention_mask=real.long()).logits[:, :-1]
        found = torch.log_softmax(logits, dim=-1).gather(2, ids[:, 1:, None])[..., 0]
        return (found * counted[:, 1:]).sum(1)

    def teach(
        self, answers: Sequence[Answered], epochs: int = 4, lr: float = 1e-3, batch_size: int = 4, rank: int = 16
    ) -> float:
        """Learn to give these answers, by a LoRA in the projections of queries and values.

        Args:
            answers: What to learn.
            epochs: How often each is seen.
            lr: Of AdamW.
            batch_size: Answers of a step.
            rank: Of the LoRA, when it is new.

        Returns:
            The mean loss per token in the last epoch.
        """
        if not self.taught:
            add_lora(self.model, rank)
            self.taught = True
        optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=lr)
        generator = torch.Generator().manual_seed(0)
        losses: list[float] = []
        for _ in range(epochs):
            order, losses = torch.randperm(len(answers), generator=generator).tolist(), []
            for start in range(0, len(order), batch_size):
                batch = [answers[place] for place in order[start : start + batch_size]]
                loss = -self.log_likelihoods(batch).sum() / sum(len(one.tokens) for one in batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        return float(np.mean(losses))

    @torch.no_grad()
    def kl(self, answers: Sequence[Answered], batch_size: int = 8) -> float:
        """How far the policy has moved from its base in nats per answer, estimated by answers that it gave itself.

        Args:
            answers: Drawn from the policy as it is now.
            batch_size: Answers at a time.
        """
        moved = []
        for start in range(0, len(answers), batch_size):
            batch = answers[start : start + batch_size]
            with without_lora(self.model):
                before = self.log_likelihoods(batch)
            moved += (self.log_likelihoods(batch) - before).tolist()
        return float(np.mean(moved))


def add_lora(model: Any, rank: int) -> None:
    """Put a new LoRA into a model, which adds nothing yet, and let it alone be trained."""
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"]), model)


@contextmanager
def without_lora(model: Any) -> Iterator[None]:
    """Let a model be its base for a while."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@torch.no_grad()
def rate(
    models: Sequence[Backbone],
    tokenizer: Any,
    candidates: Sequence[Candidate],
    max_length: int = 256,
    batch_size: int = 32,
) -> Array:
    """Rewards of answers, `(models, n)`; what is frozen reads each text once for all models that go on from it.

    Args:
        models: Reward models on the same base.
        tokenizer: Of that.
        candidates: n prompts with answers; a category that a model knows says which of its inner models reads them.
        max_length: Tokens of a text.
        batch_size: Texts at a time.

    Raises:
        ValueError: Their bases differ.
    """
    dataset = CandidateDataset(candidates, tokenizer, max_length, least_prompt=32)
    rewards = np.zeros((len(models), len(dataset)))
    if len({model.base_sha256 for model in models}) > 1:
        raise ValueError("The models are built on different bases, so that they cannot read texts together.")
    alike: dict[int, list[int]] = {}
    for number, model in enumerate(models):
        alike.setdefault(model.first, []).append(number)
    for start in range(0, len(dataset), batch_size):
        rows = list(range(start, min(start + batch_size, len(dataset))))
        batch = dataset.collate(rows)
        prompts = read_prompts(models, dataset, batch.prompts)
        categories = [dataset.categories[row] for row in rows]
        for numbers in alike.values():
            hidden = models[numbers[0]].prefix(batch.input_ids, batch.mask, batch.type_ids)
            means = pool_states(hidden, batch.mask, batch.type_ids)
            for number in numbers:
                groups = category_numbers(models[number].group_of, categories)
                reading = models[number].read(Inputs(hidden, batch.mask, means, prompts, groups), oracle=True)
                rewards[number, rows] = reading.reward.double().numpy()
    return rewards


def read_prompts(models: Sequence[Backbone], dataset: CandidateDataset, places: Sequence[int]) -> Tensor:
    """What the routers of some models read, `(B, P)`: each prompt once; zeros if none of them reads it.

    Args:
        models: On the same base.
        dataset: Where the prompts are from.
        places: Theirs there, B.
    """
    reader = next((model for model in models if model.reads_prompts), None)
    if reader is None:
        return torch.zeros(len(places), models[0].prompt_width)
    different, which = np.unique(places, return_inverse=True)
    ids, mask, _ = pad([dataset.prompts[place] for place in different], dataset.pad_id)
    return reader.read_prompts(ids, mask)[torch.from_numpy(which)]
