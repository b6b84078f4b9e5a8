"""One pretrained transformer for many tasks: an adapter in its linear layers, and heads, or its own words.

Plain torch, transformers and PEFT. B examples are R rows of L tokens, one row each or one for each option; D is the
transformer's width, C the largest number of classes or options in the batch.
"""

from collections.abc import Collection, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tasks.multitask.encode import Form
from tasks.multitask.examples import Tasks
from zoo.base_models import MINILM, AdaptedModel, Freezing, load_causal, load_encoder, without_dropout
from zoo.errors import UnknownNameError
from zoo.moe import Handles, RoutingOutput, observe_model, routed_modules

METHODS = ("none", "lora", "smora", "mola")
HEADS = ("task", "shared", "verbalised")
POOLINGS = ("mean", "first")
# Of a base.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ALL_LINEAR = "all-linear"


class MultitaskModel(AdaptedModel):
    """A transformer with an adapter, for many tasks at once.

    Called with rows it returns what it thinks of each class or option, `(B, C)`; see `forward`. An encoder's are
    logits. A causal model's are mean log-likelihoods of the option's tokens, so that long ones are not worse off.

    The attributes are the arguments of the constructor, which a checkpoint keeps, and `heads`.
    """

    def __init__(
        self,
        base: str = MINILM,
        base_sha256: str | None = None,
        tasks: dict[str, Any] | None = None,
        method: Literal["none", "lora", "smora", "mola"] = "smora",
        adapter: dict[str, Any] | None = None,
        causal: bool = False,
        head: Literal["task", "shared", "verbalised"] = "task",
        pooling: Literal["mean", "first"] = "mean",
        dropout: float = 0.0,
        freeze: Freezing = "base",
        borrowed: Freezing | None = None,
        base_dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        """Build the network around its base.

        Args:
            base: The transformer, a folder, a name on the hub, or one of `zoo.base_models.PACKAGES`.
            base_sha256: What its weights must be. None allows any, and is filled in.
            tasks: Classes of each task; `[]` where each example brings choices, None where the answer is free text.
                `add_tasks` adds more.
            method: `lora` is PEFT's, `smora` and `mola` are those of `zoo.lora`; `none` trains heads alone.
            adapter: Arguments of the method's config, `peft.LoraConfig`, `SmoraConfig` or `MolaConfig`; all linear
                layers are adapted if it does not say which.
            causal: Whether the base is a causal language model, which needs no heads.
            head: Of an encoder: `task` has a head for each task; `shared` one for all tasks of the same classes, and
                one that scores choices for all others; `verbalised` reads each class as a choice and has that one
                alone.
            pooling: What a head reads of an encoder: the `mean` over tokens, or the `first`, [CLS].
            dropout: Probability with which what a head reads is dropped.
            freeze: What of the base is not trained; without dropout if all of it is.
            borrowed: What of the base is as it came; see `AdaptedModel`.
            base_dtype: What a frozen base is held in; in `bfloat16` it takes half of the memory. What is trained is
                float32.

        Raises:
            UnknownNameError: There is no such method, head, pooling, freezing, dtype, or argument of the adapter.
            ValueError: Arguments do not fit each other or the base.
            DataNotFoundError: The base is nowhere.
            CheckpointError: It has other weights.
        """
        super().__init__(base, base_sha256, freeze, borrowed)
        check_arguments(method, adapter, causal, head, pooling, freeze, base_dtype)
        self.tasks: Tasks = {}
        self.method = method
        self.adapter = adapter
        self.causal = causal
        self.head = head
        self.pooling = pooling
        self.base_dtype = base_dtype
        self.transformer = self.load_base()
        if freeze == "base":
            without_dropout(self.transformer)
        of_the_base = self.transformer.state_dict(keep_vars=True)
        if method != "none":
            add_adapter(self.transformer, method, adapter or {})
        self.dropout = dropout
        self.heads = nn.ModuleList()
        self.set_base(of_the_base)
        self.add_tasks(tasks or {})

    def load_base(self) -> Any:
        """The base as it comes."""
        load = load_causal if self.causal else load_encoder
        return load(self.base, self.base_sha256, DTYPES[self.base_dtype])

    @property
    def form(self) -> Form:
        """What it wants to read of examples."""
        return Form(self.base, dict(self.tasks), self.causal, self.head == "verbalised")

    def add_tasks(self, tasks: Mapping[str, list[str] | None]) -> None:
        """Learn further tasks from now on, with new heads where they need any; known ones stay as they are.

        Args:
            tasks: As in the constructor.

        Raises:
            ValueError: A task is known with other classes, or has free text for answers and the base is an encoder.
        """
        for name, classes in tasks.items():
            if name in self.tasks and self.tasks[name] != classes:
                raise ValueError(
                    f"The model knows the task {name!r} with {self.tasks[name]}, the data have {classes}: give the "
                    "data's another name, in their column task."
                )
            if classes is None and not self.causal:
                raise ValueError(
                    f"The task {name!r} has free text for answers, which takes a causal base (causal: true). Or read "
                    "the answers as classes: data.columns: {text: prompt, label: target}."
                )
            self.tasks[name] = classes
        keys = self.head_keys()
        for key in list(dict.fromkeys(keys.values()))[len(self.heads) :]:
            classes = next(self.tasks[name] or [] for name in self.tasks if keys[name] == key)
            self.heads.append(self.new_head(1 if self.head == "verbalised" else max(len(classes), 1)))

    def head_keys(self) -> dict[str, Hashable]:
        """What each task shares its head with others by; a causal model has none."""
        if self.causal:
            return {}
        by: dict[str, Any] = {"task": lambda name: name, "shared": self.classes_of, "verbalised": lambda _: None}
        return {name: by[self.head](name) for name in self.tasks}

    def classes_of(self, name: str) -> tuple[str, ...]:
        """A task's classes; none where examples bring choices."""
        return tuple(self.tasks[name] or ())

    def head_of(self, task: int) -> Any:
        """The head of a task, by its place in `tasks`."""
        keys = list(self.head_keys().values())
        return self.heads[list(dict.fromkeys(keys)).index(keys[task])]

    def new_head(self, outputs: int) -> nn.Linear:
        """A head of an encoder; one that scores options needs no bias, as it would be the same for all."""
        config = self.transformer.config
        head = nn.Linear(config.hidden_size, outputs, bias=outputs > 1)
        nn.init.normal_(head.weight, std=getattr(config, "initializer_range", 0.02))
        if head.bias is not None:
            nn.init.zeros_(head.bias)
        return head.to(next(self.transformer.parameters()).device)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        type_ids: Tensor,
        scored: Tensor,
        owners: Tensor,
        options: Tensor,
        tasks: Tensor,
    ) -> Tensor:
        """Score the classes or options of B examples; `encode.Batch.inputs` are the arguments.

        Args:
            input_ids: `(R, L)` int64.
            attention_mask: `(R, L)` bool, or 0 and 1; false is padding, on the left for a causal model.
            type_ids: `(R, L)` int64, the segment of each token.
            scored: `(R,)` int64, how many of the last tokens are the option, for a causal model.
            owners: `(R,)` int64, the example of each row.
            options: `(R,)` int64, which of its options it holds.
            tasks: `(B,)` int64, places in `self.tasks`.

        Returns:
            `(B, C)`, -inf where an example has fewer than C.

        Raises:
            ValueError: The rows are longer than the base can read.
        """
        config = self.transformer.config
        limit = getattr(config, "max_position_embeddings", input_ids.shape[1])
        if input_ids.shape[1] > limit:
            raise ValueError(f"The rows have {input_ids.shape[1]} tokens; {self.base} reads at most {limit}.")
        if self.causal:
            values = self.log_likelihoods(input_ids, attention_mask, scored)
            return spread(values, owners, options, len(tasks))
        pooled = nn.functional.dropout(self.pooled(input_ids, attention_mask, type_ids), self.dropout, self.training)
        outputs = [self.head_of(task).out_features for task in tasks.unique().tolist()]
        out = pooled.new_full((len(tasks), max(*outputs, int(options.max()) + 1)), float("-inf"))
        for task in tasks.unique().tolist():
            rows = (tasks[owners] == task).nonzero().flatten()
            logits = self.head_of(task)(pooled[rows])
            places = options[rows, None] + torch.arange(logits.shape[1], device=rows.device)
            out = out.index_put((owners[rows, None].expand_as(places), places), logits.to(out.dtype))
        if self.training and torch.distributed.is_available() and torch.distributed.is_initialized():
            # Several processes wait for each other's gradients, also of heads that no example of theirs has read.
            out = out + 0 * torch.stack([parameter.sum() for parameter in self.heads.parameters()]).sum()
        return out

    def pooled(self, input_ids: Tensor, attention_mask: Tensor, type_ids: Tensor) -> Tensor:
        """What heads read, `(R, D)`."""
        config = self.transformer.config
        types = {"token_type_ids": type_ids} if getattr(config, "type_vocab_size", 0) > 1 else {}
        states = self.transformer(input_ids=input_ids, attention_mask=attention_mask, **types).last_hidden_state
        hidden: Tensor = states.float()
        if self.pooling == "first":
            return hidden[:, 0]
        weight = attention_mask.to(hidden.dtype)[..., None]
        return (hidden * weight).sum(1) / weight.sum(1)

    def log_likelihoods(self, input_ids: Tensor, attention_mask: Tensor, scored: Tensor) -> Tensor:
        """Mean log-likelihood of the last `scored` tokens of each row given those before them, `(R,)`."""
        longest = int(scored.max())
        # Only where an answer is predicted the vocabulary's logits are computed: one place before each of its tokens.
        logits = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions(attention_mask),
            logits_to_keep=longest + 1,
            use_cache=False,
        ).logits[:, :-1]
        tokens = nn.functional.log_softmax(logits.float(), dim=-1).gather(-1, input_ids[:, -longest:, None])[..., 0]
        counted = torch.arange(longest, 0, -1, device=scored.device) <= scored[:, None]
        return tokens.masked_fill(~counted, 0).sum(1) / scored

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor, new_tokens: int, pad_id: int) -> Tensor:
        """The most likely continuation, token by token.

        Args:
            input_ids: `(R, L)` int64, padded on the left.
            attention_mask: `(R, L)` bool.
            new_tokens: At most so many.
            pad_id: What follows the end of a text.

        Returns:
            `(R, <= new_tokens)`, the new tokens alone.
        """
        whole: Tensor = self.transformer.generate(
            input_ids=input_ids,
            attention_mask=attention_mask.long(),
            max_new_tokens=new_tokens,
            do_sample=False,
            # A base brings settings of its own for chats.
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            pad_token_id=pad_id,
        )
        return whole[:, input_ids.shape[1] :]

    @property
    def routed(self) -> bool:
        """Whether anything in it is routed."""
        return bool(routed_modules(self))

    @contextmanager
    def watched(self) -> Iterator[dict[str, RoutingOutput]]:
        """What each routed module decided last for its T = R * L tokens, by `module_name`, while the block runs."""
        routing: dict[str, RoutingOutput] = {}
        names = iter(routed_modules(self))

        def observer(name: str) -> Any:
            return lambda found: routing.update({module_name(name): found})

        handles = observe_model(self, observer) if next(names, None) else Handles([])
        try:
            yield routing
        finally:
            handles.remove()


def module_name(path: str) -> str:
    """The adapted layer for people: `layer 3 attention.self.query`, counted from 0.

    Args:
        path: Of its mixture in the model.
    """
    # The last two are the method and the adapter's name.
    parts = path.split(".")[:-2]
    layer = next((place for place, part in enumerate(parts) if part.isdecimal()), None)
    return ".".join(parts) if layer is None else f"layer {parts[layer]} {'.'.join(parts[layer + 1 :])}"


def spread(values: Tensor, owners: Tensor, options: Tensor, examples: int) -> Tensor:
    """Values of rows as a table of examples and options, -inf where there is none.

    Args:
        values: `(R,)`.
        owners: `(R,)`, the example of each.
        options: `(R,)`, its column.
        examples: B.
    """
    table = values.new_full((examples, int(options.max()) + 1), float("-inf"))
    return table.index_put((owners, options), values)


def positions(attention_mask: Tensor) -> Tensor:
    """Positions of the tokens of rows that are padded on the left, counted from the first real one, `(R, L)`."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


def add_adapter(transformer: nn.Module, method: str, arguments: Mapping[str, Any]) -> None:
    """Adapt a transformer's linear layers by weights in float32, in place.

    Args:
        transformer: The base.
        method: One of `METHODS`, but `none`.
        arguments: Of its config.

    Raises:
        UnknownNameError: There is no such argument.
        ValueError: One is not allowed, or nothing was adapted.
    """
    import inspect

    from peft import LoraConfig, inject_adapter_in_model

    from zoo.lora import MolaConfig, SmoraConfig

    config_class = {"lora": LoraConfig, "smora": SmoraConfig, "mola": MolaConfig}[method]
    known = inspect.signature(config_class).parameters
    for name in arguments:
        if name not in known:
            raise UnknownNameError(f"argument of {config_class.__name__}", name, known)
    of_the_base = set(map(id, transformer.parameters()))
    inject_adapter_in_model(config_class(**{"target_modules": ALL_LINEAR, **arguments}), transformer)
    for parameter in transformer.parameters():
        if id(parameter) not in of_the_base:
            # PEFT gives adapters what their layer has, in which a small step is lost.
            parameter.data = parameter.data.float()


def check_arguments(
    method: str, adapter: Mapping[str, Any] | None, causal: bool, head: str, pooling: str, freeze: str, base_dtype: str
) -> None:
    """Refuse arguments that do not exist or do not fit each other; see `MultitaskModel`."""
    names: dict[str, tuple[str, Collection[str]]] = {
        "method": (method, METHODS),
        "head": (head, HEADS),
        "pooling": (pooling, POOLINGS),
        "dtype of the base": (base_dtype, DTYPES),
    }
    for what, (name, known) in names.items():
        if name not in known:
            raise UnknownNameError(what, name, known)
    if base_dtype != "float32" and freeze != "base":
        raise ValueError(f"base_dtype={base_dtype!r}, freeze={freeze!r}: what is trained is float32; freeze the base.")
    if adapter and method == "none":
        raise ValueError(f"adapter={dict(adapter)}: has no effect on method='none'; name a method, e.g. smora.")
    if causal and method == "none" and freeze == "base":
        raise ValueError("method='none' with freeze='base': a causal model has no heads, so nothing would be trained.")
    if causal and freeze == "embeddings":
        raise ValueError("freeze='embeddings': is for encoders; a causal base takes 'base' or 'nothing'.")
    if causal and (head != "task" or pooling != "mean"):
        raise ValueError(f"head={head!r}, pooling={pooling!r}: are of encoders; a causal model has no heads.")
