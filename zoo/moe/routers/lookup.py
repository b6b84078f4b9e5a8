"""Routers that look tokens up: fixed tables, and tables learned in a first stage."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from zoo.moe.routers.base import LinearRouter, Router, forbid, linear_fp32, linear_weight, require
from zoo.moe.routing import RouterInput, RoutingOutput


class HashRouter(Router):
    """Hash layers (Roller et al. 2021, arXiv 2106.04426): the experts of a token id are fixed in a table.

    Without `input_dim` there are no parameters and every weight is 1/K; with it a learned gate weighs the fixed choice
    (its softmax over the K chosen, or over all experts for K = 1, where the former would be constant).
    """

    table: Tensor

    def __init__(
        self,
        num_experts: int,
        vocab_size: int,
        top_k: int = 1,
        table: Literal["random", "balanced"] | Sequence[Sequence[int]] = "random",
        frequencies: Sequence[float] | None = None,
        input_dim: int | None = None,
        seed: int = 0,
    ) -> None:
        """Build the table.

        Args:
            num_experts: E.
            vocab_size: Number of token ids.
            top_k: K experts per id.
            table: `random`; `balanced` (the most frequent id first, each to the experts with the least traffic); or the
                table itself, K experts for each id.
            frequencies: How often each id occurs; needed for `balanced`.
            input_dim: D of the router input that a learned gate reads; None is no gate.
            seed: Of the random table.

        Raises:
            ValueError: An argument is not allowed; the message names it.
        """
        super().__init__(num_experts, top_k)
        require(top_k <= num_experts, "top_k", top_k, f"must not exceed num_experts={num_experts}")
        require(vocab_size >= 1, "vocab_size", vocab_size, "must be at least 1")
        self.vocab_size = vocab_size
        self.register_buffer("table", self.build_table(table, frequencies, seed))
        self.weight = None if input_dim is None else linear_weight(num_experts, input_dim)

    def build_table(
        self, table: str | Sequence[Sequence[int]], frequencies: Sequence[float] | None, seed: int
    ) -> Tensor:
        """The experts of each token id, `(vocab_size, K)` int64."""
        if table == "random":
            generator = torch.Generator().manual_seed(seed)
            return torch.rand(self.vocab_size, self.num_experts, generator=generator).argsort(1)[:, : self.top_k]
        if table == "balanced":
            require(
                frequencies is not None and len(frequencies) == self.vocab_size,
                "frequencies",
                frequencies if frequencies is None else f"{len(frequencies)} values",
                f"must hold one number for each of {self.vocab_size} token ids if table='balanced'",
            )
            return balanced_table(torch.tensor(frequencies, dtype=torch.float64), self.num_experts, self.top_k)
        require(not isinstance(table, str), "table", table, "must be random, balanced or the table itself")
        given = torch.tensor(table)
        shape = (self.vocab_size, self.top_k)
        require(given.shape == shape, "table", f"shape {tuple(given.shape)}", f"must have shape {shape}")
        allowed = not given.is_floating_point() and int(given.min()) >= 0 and int(given.max()) < self.num_experts
        require(allowed, "table", "entries", f"must be integers in 0..{self.num_experts - 1}")
        repeats = (given.sort(dim=1).values.diff(dim=1) == 0).any(dim=1).nonzero().flatten().tolist()
        require(not repeats, "table", given[repeats[:1]].tolist(), f"must hold {self.top_k} different experts in a row")
        return given.long()

    def route(self, units: RouterInput) -> RoutingOutput:
        """Route T units by `token_ids` `(T,)`."""
        index = self.table[known_ids(units, self.vocab_size)]
        if self.weight is None:
            logits = torch.zeros(index.shape[0], self.num_experts, device=index.device)
        else:
            logits = linear_fp32(units.x, self.weight)
        logits = forbid(logits, units.expert_mask)
        probs = torch.softmax(logits, dim=1)
        chosen = logits.gather(1, index)
        empty = chosen == float("-inf")
        gated_switch = self.weight is not None and self.top_k == 1
        # A softmax over forbidden experts alone would be NaN.
        known = chosen.masked_fill(empty.all(1, keepdim=True), 0.0)
        weight = probs.gather(1, index) if gated_switch else torch.softmax(known, dim=1)
        index = index.masked_fill(empty, self.num_experts)
        return self.output(units, index, weight, logits=logits, probs=probs)


def known_ids(units: RouterInput, vocab_size: int) -> Tensor:
    """The token ids `(T,)`, 0 for padding, whose ids may be anything.

    Raises:
        ValueError: One is not in the vocabulary. CUDA says so by a `RuntimeError`, and later, as nothing waits for it.
    """
    ids = units.known_token_ids()
    if units.mask is not None:
        ids = ids.masked_fill(~units.mask, 0)
    if torch.compiler.is_compiling() or ids.device.type not in ("cpu", "cuda"):
        return ids
    known, rule = ((ids >= 0) & (ids < vocab_size)).all(), f"must be in 0..{vocab_size - 1}, as vocab_size={vocab_size}"
    if ids.is_cuda:
        torch._assert_async(known, f"token_ids: {rule}.")
    elif not known:
        require(False, "token_ids", f"{int(ids.min())}..{int(ids.max())}", rule)
    return ids


def balanced_table(frequencies: Tensor, num_experts: int, top_k: int) -> Tensor:
    """Greedy balance: ids by falling frequency, each to the K experts that have seen the least so far.

    Args:
        frequencies: `(V,)`.
        num_experts: E.
        top_k: K.

    Returns:
        `(V, K)` int64.
    """
    table = torch.empty(frequencies.shape[0], top_k, dtype=torch.int64)
    traffic = torch.zeros(num_experts, dtype=torch.float64)
    for token in frequencies.argsort(descending=True, stable=True).tolist():
        table[token] = traffic.argsort(stable=True)[:top_k]
        traffic[table[token]] += frequencies[token]
    return table


class StableMoERouter(LinearRouter):
    """StableMoE (Dai et al. 2022, arXiv 2204.08396): a routing learned in stage 1 is distilled and frozen.

    Stage 1: each unit goes to its best expert, and a student that sees the token id alone learns that choice (loss
    `distillation`, beside `load_balancing`). After `freeze()` the student decides and no longer learns. In both stages
    the weight is the sigmoid of the learned score of the chosen expert.
    """

    frozen: Tensor

    def __init__(self, input_dim: int, num_experts: int, vocab_size: int, student_dim: int = 50) -> None:
        """Build teacher and student.

        Args:
            input_dim: D of the router input.
            num_experts: E.
            vocab_size: Number of token ids.
            student_dim: Width of the student's token embeddings.

        Raises:
            ValueError: An argument is not allowed; the message names it.
        """
        super().__init__(input_dim, num_experts, top_k=1)
        require(vocab_size >= 1, "vocab_size", vocab_size, "must be at least 1")
        require(student_dim >= 1, "student_dim", student_dim, "must be at least 1")
        self.embedding = nn.Embedding(vocab_size, student_dim)
        self.student_weight = linear_weight(num_experts, student_dim)
        self.register_buffer("frozen", torch.tensor(False))

    def freeze(self) -> None:
        """Begin stage 2."""
        self.frozen.fill_(True)

    def route(self, units: RouterInput) -> RoutingOutput:
        """Route T units by `x` `(T, D)` and `token_ids` `(T,)`."""
        logits = self.logits(units)
        student = linear_fp32(self.embedding(known_ids(units, self.embedding.num_embeddings)), self.student_weight)
        # What eval mode asks of a buffer it asks by tensors, so that it exports.
        student = forbid(student.detach() if self.training and self.frozen else student, units.expert_mask)
        index = torch.where(self.frozen, student, logits).argmax(1, keepdim=True)
        score = logits.gather(1, index)
        index = index.masked_fill(score == float("-inf"), self.num_experts)
        probs = torch.softmax(logits, dim=1)
        return self.output(units, index, torch.sigmoid(score), logits=logits, probs=probs, distilled_logits=student)
