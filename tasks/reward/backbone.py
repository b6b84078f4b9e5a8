"""The frozen base of all reward models: layer by layer, so that a prefix is computed once and its last layers often.

B texts of L tokens, D the base's width. Encoders with BERT's layers read a text's reward off its first token, so that
their last layer computes that token alone; causal models with Llama's layers read it off the last one. Beside it, heads
read the means over the text and over its answer of the states that enter the adapted layers: what is spread over many
tokens need not pass through one, and means of what is frozen cost nothing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tasks.reward.lora import AdaptedLinear, LoraExperts, attached
from zoo.base_models import MINILM, AdaptedModel, without_dropout
from zoo.moe.routers.base import require

BERT, LLAMA = "encoder.layer", "layers"
# Twice a rank of 16. With the same for all ranks a step of Adam moves a layer equally far, so that one learning rate
# suits all.
ALPHA = 32.0
# At how many depths of the base routers and gates read a prompt.
PROMPT_DEPTHS = 4

# Texts as inner models read them: `hidden`, `mask` and `means` of `Inputs`, or of some of its rows.
Streams = tuple[Tensor, Tensor, Tensor]


@dataclass(slots=True)
class Inputs:
    """Texts as a reward model reads them, their prefix computed.

    Attributes:
        hidden: `(B, L, D)` float32 states that enter the first adapted layer.
        mask: `(B, L)` bool, false is padding.
        means: `(B, 2 D)` float32, `pool_states` of them.
        prompts: `(B, P)` float32, `Backbone.read_prompts` of their prompts.
        groups: `(B,)` int64, the inner model of each text's category; -1 where it is not known.
        digest: `(B, X)`, what `Backbone.digest` makes of the texts, which are not read again then.
    """

    hidden: Tensor
    mask: Tensor
    means: Tensor
    prompts: Tensor
    groups: Tensor
    digest: Tensor | None = None

    @property
    def streams(self) -> Streams:
        """What is read of the texts themselves."""
        return self.hidden, self.mask, self.means


@dataclass(frozen=True, slots=True)
class Reading:
    """What a reward model says of B texts.

    Attributes:
        reward: `(B,)`.
        scores: `(B, S)`, the reward of each of its experts, members or objectives; S may be 0.
        route: `(B,)` int64, the inner model that the router chose, whichever was used; 0 without a router.
    """

    reward: Tensor
    scores: Tensor
    route: Tensor


class Backbone(AdaptedModel):
    """Base of the reward models: a frozen transformer with LoRA experts in its last layers.

    A subclass adds its experts by `lora_experts`, ends its constructor with `self.complete()`, and has `phases`,
    `phase_parameters`, `phase_loss` and `read`, see below.

    Attributes:
        phases: What is trained, one after another.
        labelled_phase: The one of these that reads labels of capabilities; empty where none does.
        capability_names: The U capabilities whose labels `phase_loss` is given.
        group_of: The number of each category's inner model.
        groups: The categories of each inner model.
    """

    phases: tuple[str, ...] = ()
    labelled_phase: str = ""
    capability_names: Sequence[str] = ()
    group_of: Mapping[str, int]
    groups: Mapping[str, Sequence[str]]

    def __init__(
        self, base: str = MINILM, base_sha256: str | None = None, layers: int = 1, head_decay: float = 0.0
    ) -> None:
        """Load the base and make its last layers ready for LoRA.

        Args:
            base: A folder, or a name on the hub: an encoder with BERT's layers (BERT, RoBERTa, ELECTRA), or a causal
                model with Llama's (Llama, Qwen2, Mistral, SmolLM2).
            base_sha256: What its weights must be; None allows any, and is filled in.
            layers: How many of its last layers are adapted; 0 is all.
            head_decay: Weight of the squared length of each head that learns what people prefer, in its loss: a few
                thousand pairs do not tell how much each of W numbers counts.

        Raises:
            ValueError: It has other layers, or not so many; the decay is negative.
            DataNotFoundError: The base is nowhere.
            CheckpointError: It has other weights.
        """
        require(head_decay >= 0, "head_decay", head_decay, "must not be negative")
        super().__init__(base, base_sha256)
        self.head_decay = head_decay
        self.encoder = without_dropout(self.load_base())
        self.of_the_base = dict(self.encoder.state_dict(keep_vars=True))
        names = {name for name, _ in self.encoder.named_modules()}
        if f"{BERT}.0.attention.self.query" in names:
            self.kind = BERT
        elif f"{LLAMA}.0.self_attn.q_proj" in names:
            self.kind = LLAMA
        else:
            raise ValueError(
                f"base={base!r} is a {type(self.encoder).__name__}: a reward model needs an encoder with the layers of "
                "BERT (as RoBERTa and ELECTRA have them), or a causal model with those of Llama."
            )
        self.depth = len(self.encoder.get_submodule(self.kind))
        self.dim = int(self.encoder.config.hidden_size)
        # What a head reads, see `split_read`.
        self.width = 3 * self.dim
        # The embeddings are depth 0.
        depths = torch.linspace(0, self.depth, PROMPT_DEPTHS).round().int().tolist()
        self.prompt_depths = tuple(dict.fromkeys(depths))
        self.prompt_width = len(self.prompt_depths) * self.dim
        self.first = self.first_of(layers)
        # A plain mapping: the modules belong to the encoder.
        self.adapted = {
            f"{layer}-{path.replace('.', '-')}": self.adapt(f"{self.kind}.{layer}", path)
            for layer in range(self.first, self.depth)
            for path in linear_paths(self.encoder.get_submodule(f"{self.kind}.{layer}"))
        }

    def complete(self) -> None:
        """Freeze the base; the end of a subclass's constructor."""
        self.set_base(self.__dict__.pop("of_the_base"))

    def first_of(self, layers: int) -> int:
        """Position of the first of the last so many layers; 0 is all of them.

        Raises:
            ValueError: There are not so many.
        """
        if not 0 <= layers <= self.depth:
            raise ValueError(f"layers={layers}: must be from 0 (all) to {self.depth}, as {self.base!r} has that many.")
        return self.depth - (layers or self.depth)

    def adapt(self, layer: str, path: str) -> AdaptedLinear:
        """Wrap a linear layer of the encoder."""
        name = f"{layer}.{path}"
        parent, _, child = name.rpartition(".")
        wrapped = AdaptedLinear(self.encoder.get_submodule(name))
        setattr(self.encoder.get_submodule(parent), child, wrapped)
        return wrapped

    def lora_experts(self, count: int, rank: int, layers: int | None = None) -> LoraExperts:
        """New experts; what they add is scaled by `ALPHA` divided by the rank.

        Args:
            count: N.
            rank: Of each.
            layers: In how many last layers, at most as many as are adapted; None is those.

        Raises:
            ValueError: The rank is not positive, or there are not so many layers.
        """
        require(rank >= 1, "rank of a LoRA", rank, "must be at least 1")
        first = self.first if layers is None else max(self.first, self.first_of(layers))
        adapted = {name: layer for name, layer in self.adapted.items() if int(name.partition("-")[0]) >= first}
        return LoraExperts(count, adapted, first, self.width, rank, ALPHA)

    # --- the base, in two halves ---------------------------------------------------------------------------------

    def embed(self, input_ids: Tensor, type_ids: Tensor | None) -> Tensor:
        """Embeddings `(B, L, D)`.

        Raises:
            ValueError: The texts are longer than the base can read.
        """
        config, length = self.encoder.config, input_ids.shape[1]
        limit = config.max_position_embeddings - (config.pad_token_id + 1 if "roberta" in config.model_type else 0)
        if length > limit:
            raise ValueError(f"The texts have {length} tokens; {self.base} reads at most {limit}.")
        if self.kind == LLAMA:
            found: Tensor = self.encoder.embed_tokens(input_ids)
            return found
        types = {"token_type_ids": type_ids} if getattr(config, "type_vocab_size", 0) > 1 else {}
        embedded: Tensor = self.encoder.embeddings(input_ids=input_ids, **types)
        project = getattr(self.encoder, "embeddings_project", None)
        return embedded if project is None else project(embedded)

    def run(self, hidden: Tensor, mask: Tensor, layers: range, pooled: bool = False) -> Tensor:
        """Some of the base's layers.

        Args:
            hidden: `(rows, L, D)`.
            mask: `(B, L)` bool; repeated with the rows.
            layers: Which.
            pooled: Whether of the last of these only the first token is needed, which BERT's layers can do alone.

        Returns:
            `(rows, L, D)`, or `(rows, 1, D)`.
        """
        modules = self.encoder.get_submodule(self.kind)
        if self.kind == BERT:
            for layer in layers:
                hidden = bert_layer(modules[layer], hidden, mask, pooled and layer == layers[-1])
            return hidden
        length = mask.shape[1]
        places = torch.arange(length, device=mask.device)[None]
        rotary = self.encoder.rotary_emb(hidden, position_ids=places)
        # A padding token attends to itself, or its row of the softmax would be empty.
        allowed = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril() & mask[:, None, None, :]
        allowed = allowed | torch.eye(length, dtype=torch.bool, device=mask.device)
        for layer in layers:
            copies = hidden.shape[0] // mask.shape[0]
            hidden = modules[layer](
                hidden,
                attention_mask=allowed.repeat(copies, 1, 1, 1),
                position_ids=places,
                position_embeddings=rotary,
            )
        return hidden

    @torch.no_grad()
    def prefix(self, input_ids: Tensor, mask: Tensor, type_ids: Tensor | None = None) -> Tensor:
        """What enters the first adapted layer, `(B, L, D)`; it depends on the frozen base alone.

        Args:
            input_ids: `(B, L)` int64.
            mask: `(B, L)` bool.
            type_ids: `(B, L)` int64, for encoders that tell prompt and answer apart.

        Raises:
            ValueError: The texts are longer than the base can read.
        """
        return self.run(self.embed(input_ids, type_ids), mask.bool(), range(self.first))

    def finish(self, streams: Streams, experts: Sequence[LoraExperts]) -> Tensor:
        """What heads read of texts under LoRA experts, in one pass.

        Args:
            streams: B texts.
            experts: What is added, in order; only the last may have several experts, N.

        Returns:
            `(B, N, 3 D)`: a text's last state under each expert, and its means, which are the same under all.
        """
        hidden, mask, means = streams
        texts, last = hidden.shape[0], experts[-1]
        with attached(self.adapted, experts, texts):
            hidden = self.run(hidden, mask, range(self.first, last.first))
            if self.kind == LLAMA and last.count > 1:
                # Its layers take input and residual from the same rows.
                hidden = hidden.repeat(last.count, 1, 1)
            hidden = self.run(hidden, mask, range(last.first, self.depth), pooled=True)
        if self.kind == LLAMA:
            ends = mask.shape[1] - 1 - mask.int().flip(1).argmax(1)
            places = ends.repeat(hidden.shape[0] // texts)
            hidden = self.encoder.norm(hidden[torch.arange(hidden.shape[0], device=mask.device), places])
        else:
            hidden = hidden[:, 0]
        states = hidden.view(last.count, texts, -1).transpose(0, 1)
        return torch.cat([states, means[:, None].expand(-1, last.count, -1)], dim=2)

    @torch.no_grad()
    def read_prompts(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """What a router reads: means over a prompt's tokens of the base's states at several depths, normalised.

        What a prompt is about is in the last ones, how it is written in the first.

        Args:
            input_ids: `(B, L)` int64, prompts alone.
            mask: `(B, L)` bool.

        Returns:
            `(B, P)` float32, P = `prompt_width`.
        """
        mask = mask.bool()
        hidden = self.embed(input_ids, torch.zeros_like(input_ids))
        means = []
        for start, depth in pairwise([0, *self.prompt_depths]):
            hidden = self.run(hidden, mask, range(start, depth))
            read = self.encoder.norm(hidden) if self.kind == LLAMA and depth == self.depth else hidden
            mean = (read.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            means.append(nn.functional.layer_norm(mean, mean.shape[-1:]))
        return torch.cat(means, dim=1)

    # --- what a reward model adds ---------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        mask: Tensor,
        type_ids: Tensor,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
    ) -> Tensor:
        """Rewards `(B,)` of texts.

        Args:
            input_ids: `(B, L)` int64, prompt and answer.
            mask: `(B, L)` bool, or 0 and 1.
            type_ids: `(B, L)` int64.
            prompt_ids: `(B, M)` int64, the prompts alone.
            prompt_mask: `(B, M)` bool, or 0 and 1.
        """
        unknown = torch.full((len(input_ids),), -1, device=input_ids.device)
        hidden = self.prefix(input_ids, mask.bool(), type_ids)
        prompts = hidden.new_zeros(len(hidden), self.prompt_width)
        if self.reads_prompts:
            prompts = self.read_prompts(prompt_ids, prompt_mask)
        means = pool_states(hidden, mask.bool(), type_ids)
        return self.read(Inputs(hidden, mask.bool(), means, prompts, unknown)).reward

    def score_names(self, route: int) -> list[str]:
        """What the scores of a text are called that an inner model has read.

        Args:
            route: Its number.
        """
        raise TypeError(f"{type(self).__name__} must define score_names(route).")

    def read(self, inputs: Inputs, oracle: bool = False) -> Reading:
        """Rewards, and what they are made of.

        Args:
            inputs: B texts.
            oracle: Whether texts go to the inner model of their own category, where it is known, and not where the
                router sends them.
        """
        raise TypeError(f"{type(self).__name__} must define read(inputs).")

    def phase_parameters(self, phase: str) -> list[nn.Parameter]:
        """What a phase trains; nothing else is touched by it."""
        raise TypeError(f"{type(self).__name__} must define phase_parameters(phase).")

    def head_parameters(self) -> list[nn.Parameter]:
        """What reads scores off states."""
        return [module.head for module in self.modules() if isinstance(module, LoraExperts)]

    @property
    def reads_prompts(self) -> bool:
        """Whether `Inputs.prompts` matter."""
        return False

    def check_plan(self, plan: Sequence[str], pretrained: str | None) -> None:
        """Called before training: refuse phases that do not go together.

        Args:
            plan: The phase of each epoch.
            pretrained: The checkpoint that is trained on, if any.

        Raises:
            ValueError: A part of a new model would be heard as it was drawn.
        """
        needed = self.needed_phases(plan)
        if not pretrained and (missing := [phase for phase in needed if phase not in plan]):
            raise ValueError(
                f"epochs without {', '.join(missing)}: what they train would stay as it was drawn, and be heard; a new "
                f"model needs {', '.join(needed)}. Give them epochs, or go on from a checkpoint (model.pretrained)."
            )

    def needed_phases(self, plan: Sequence[str]) -> list[str]:
        """Phases that a new model cannot do without, in their order; the first by default.

        Args:
            plan: The phase of each epoch.
        """
        return list(self.phases[:1])

    def begin(self, phase: str) -> None:
        """Called before the first step of a phase; nothing by default."""

    def phase_loss(self, phase: str, inputs: Inputs, preferences: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of a phase on B pairs.

        Args:
            phase: One of `phases`.
            inputs: 2B texts: the chosen answers of all pairs, then the rejected ones.
            preferences: `(B, U)` int8: 1 where the chosen answer is better in a capability, -1 the rejected, 0 unclear.

        Returns:
            The loss, and `(n,)` bool: of the decisions that it is about, which were right.
        """
        raise TypeError(f"{type(self).__name__} must define phase_loss(phase, inputs, preferences).")

    def digest(self, phase: str, inputs: Inputs) -> Tensor | None:
        """What a phase reads of texts and no step of it changes, so that once is enough; None where there is nothing.

        Args:
            phase: One of `phases`.
            inputs: B texts.

        Returns:
            `(B, X)`, without gradient.
        """
        return None

    def apply_phase(self, phase: str | None) -> None:
        """Let gradients reach what a phase trains, and nothing else; None freezes all."""
        self.requires_grad_(False)
        for parameter in self.phase_parameters(phase) if phase else []:
            parameter.requires_grad_(True)


def pool_states(hidden: Tensor, mask: Tensor, type_ids: Tensor) -> Tensor:
    """Means of states over texts and over their answers, each of mean 0 and variance 1: `(B, 2 D)` float32.

    Args:
        hidden: `(B, L, D)`.
        mask: `(B, L)` bool, false is padding.
        type_ids: `(B, L)`, 1 for the tokens of the answer.
    """
    means = []
    for part in (mask, mask & (type_ids == 1)):
        total = torch.einsum("bld,bl->bd", hidden.float(), part.float())
        means.append(nn.functional.layer_norm(total / part.sum(1, keepdim=True).clamp(min=1), total.shape[-1:]))
    return torch.cat(means, dim=1)


def split_read(read: Tensor) -> tuple[Tensor, Tensor]:
    """Of what heads read, or of heads, `(..., 3 D)`: the last states `(..., D)`, and the means `(..., 2 D)`."""
    dim = read.shape[-1] // 3
    return read[..., :dim], read[..., dim:]


def linear_paths(layer: nn.Module) -> list[str]:
    """Dotted names of a layer's linear maps."""
    return [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]


def bert_layer(layer: Any, hidden: Tensor, mask: Tensor, pooled: bool) -> Tensor:
    """A layer of BERT, in which LoRAs may repeat the rows.

    Args:
        layer: As transformers builds it.
        hidden: `(rows, L, D)`.
        mask: `(B, L)` bool.
        pooled: Whether only the first token's output is needed.

    Returns:
        `(rows, L, D)`, or of the first token `(rows, 1, D)`; more rows than before where N LoRAs read the same ones.
    """
    attend = attend_from_first if pooled else attend_from_all
    asking, context = hidden[:, :1] if pooled else hidden, attend(layer.attention.self, hidden, mask)
    asking = asking.repeat(context.shape[0] // asking.shape[0], 1, 1)
    attended = layer.attention.output(context, asking)
    out: Tensor = layer.output(layer.intermediate(attended), attended)
    return out


def attend_from_all(attention: Any, hidden: Tensor, mask: Tensor) -> Tensor:
    """What the heads of a layer of BERT read for every token, `(rows, L, D)`; see `bert_layer`."""
    heads = (attention.num_attention_heads, attention.attention_head_size)
    query, key, value = (
        part(hidden).unflatten(-1, heads).transpose(1, 2) for part in (attention.query, attention.key, attention.value)
    )
    allowed = mask.repeat(query.shape[0] // mask.shape[0], 1)[:, None, None, :]
    context = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
    return context.transpose(1, 2).flatten(2)


def attend_from_first(attention: Any, hidden: Tensor, mask: Tensor) -> Tensor:
    """What they read for the first token, `(rows, 1, D)`, without a key or value of any token.

    `q (W_k x + b_k) = (q W_k) x + q b_k`, of which the last is the same for all tokens, and
    `sum p (W_v x + b_v) = W_v (sum p x) + b_v`: a product per text and head in place of two per token.

    Args:
        attention: Of the layer; its key and value are `AdaptedLinear`.
        hidden: `(R, L, D)`, which N LoRAs may read.
        mask: `(B, L)` bool.
    """
    heads, texts = attention.num_attention_heads, hidden.shape[0]
    query = attention.query(hidden[:, :1])[:, 0].unflatten(-1, (heads, -1))
    copies = query.shape[0] // texts
    asked = attention.key.transposed(query) / math.sqrt(query.shape[-1])
    scores = by_text(asked, texts) @ hidden.transpose(1, 2)
    padding = ~mask.repeat(texts // mask.shape[0], 1)[:, None]
    read = scores.masked_fill(padding, float("-inf")).softmax(-1) @ hidden
    read = read.unflatten(1, (copies, heads)).transpose(0, 1).flatten(0, 1)
    context: Tensor = attention.value.head_by_head(read, heads)
    return context.flatten(1)[:, None]


def by_text(rows: Tensor, texts: int) -> Tensor:
    """`(copies * R, H, D)` of R texts, copies first, as `(R, copies * H, D)`."""
    return rows.unflatten(0, (-1, texts)).transpose(0, 1).flatten(1, 2)


def stack_names(groups: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """The number of each category's inner model.

    Args:
        groups: Categories by inner model.

    Raises:
        ValueError: A category is in two groups.
    """
    numbers: dict[str, int] = {}
    for number, (group, categories) in enumerate(groups.items()):
        for category in categories:
            if category in numbers:
                raise ValueError(f"groups: the category {category!r} is in {group!r} and in another group.")
            numbers[category] = number
    return numbers
