"""Several LoRAs of the same linear layers, computed in one pass: the rows of a batch are repeated once per LoRA.

B texts of L tokens; N LoRAs of rank r; D and O are a linear layer's widths. Copies come first: row `n * B + b` is text
b under LoRA n.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class LoraStack(nn.Module):
    """N LoRAs of one linear layer (Hu et al. 2021, arXiv 2106.09685), each `alpha / r * B A x`.

    Attributes:
        lora_A: `(N, r, D)`, drawn as PEFT draws them.
        lora_B: `(N, O, r)`, zero at the start.
    """

    def __init__(self, count: int, in_features: int, out_features: int, rank: int, alpha: float) -> None:
        """Build LoRAs that add nothing yet."""
        super().__init__()
        self.scaling = alpha / rank
        self.lora_A = nn.Parameter(torch.empty(count, rank, in_features))
        self.lora_B = nn.Parameter(torch.zeros(count, out_features, rank))
        for matrix in self.lora_A:
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))

    def forward(self, result: Tensor, x: Tensor, texts: int) -> Tensor:
        """Add to the output of the linear layer.

        Args:
            result: `(rows, L, O)`, what the linear layer made of `x`.
            x: `(rows, L, D)`; `rows` is B, or N * B once the texts have been repeated.
            texts: B.

        Returns:
            `(N * B, L, O)`; a single LoRA adds to whatever rows there are.
        """
        count, length = len(self.lora_A), x.shape[1]
        if count == 1:
            return result + nn.functional.linear(nn.functional.linear(x, self.lora_A[0]), self.lora_B[0] * self.scaling)
        if x.shape[0] == texts:
            # All LoRAs read the same rows, so that what is below them is computed once.
            low = nn.functional.linear(x, self.lora_A.flatten(0, 1)).view(-1, count, self.lora_A.shape[1])
            low, base = low.transpose(0, 1), result.reshape(1, texts * length, -1).expand(count, -1, -1)
        else:
            low = torch.bmm(x.reshape(count, texts * length, -1), self.lora_A.transpose(1, 2))
            base = result.reshape(count, texts * length, -1)
        added = torch.baddbmm(base, low, self.lora_B.transpose(1, 2), alpha=self.scaling)
        return added.view(count * texts, length, -1)

    def head_by_head(self, x: Tensor, heads: int) -> Tensor:
        """What is added of the outputs of H heads, each of which reads an input of its own.

        Args:
            x: `(rows, H, D)`; `rows` is N * B, or any number of a single LoRA.
            heads: H, which O is divided among.

        Returns:
            `(rows, H, O / H)`.
        """
        low = torch.einsum("nbhd,nrd->nbhr", x.unflatten(0, (len(self.lora_A), -1)), self.lora_A)
        added = torch.einsum("nbhr,nhor->nbho", low, self.lora_B.unflatten(1, (heads, -1)))
        return added.flatten(0, 1) * self.scaling

    def transposed(self, asked: Tensor) -> Tensor:
        """What is added of the transposed map of each head: `(rows, H, O / H)` to `(rows, H, D)`."""
        up = self.lora_B.unflatten(1, (asked.shape[1], -1))
        low = torch.einsum("nbho,nhor->nbhr", asked.unflatten(0, (len(self.lora_A), -1)), up)
        return torch.einsum("nbhr,nrd->nbhd", low, self.lora_A).flatten(0, 1) * self.scaling


class AdaptedLinear(nn.Module):
    """A linear layer of the base, and the LoRAs that are in use at the moment.

    Attributes:
        base: The layer itself.
        stacks: What is added to it now; `attached` sets it.
        texts: B of the batch that is being read.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.stacks: tuple[LoraStack, ...] = ()
        self.texts = 0

    def forward(self, x: Tensor) -> Tensor:
        """Map `(rows, L, D)` to `(rows, L, O)`, or to `(N * B, L, O)` where N LoRAs meet the texts first."""
        result: Tensor = self.base(x)
        for stack in self.stacks:
            result = stack(result, x, self.texts)
        return result

    def head_by_head(self, x: Tensor, heads: int) -> Tensor:
        """Outputs of H heads, each of which reads an input of its own: `(rows, H, D)` to `(rows, H, O / H)`."""
        result = torch.einsum("rhd,hod->rho", x, self.base.weight.unflatten(0, (heads, -1)))
        if self.base.bias is not None:
            result = result + self.base.bias.unflatten(0, (heads, -1))
        return result + sum(stack.head_by_head(x, heads) for stack in self.stacks)

    def transposed(self, asked: Tensor) -> Tensor:
        """The transposed map of each head, without bias: `(rows, H, O / H)` to `(rows, H, D)`."""
        weight = self.base.weight.unflatten(0, (asked.shape[1], -1))
        return torch.einsum("rho,hod->rhd", asked, weight) + sum(stack.transposed(asked) for stack in self.stacks)


class LoraExperts(nn.Module):
    """N experts, each a LoRA in every adapted linear layer and a linear head that reads a score off what comes of it.

    Attributes:
        first: The first layer that is adapted.
        head: `(N, W)`, zero at the start. A bias would add the same to both answers.
    """

    def __init__(
        self, count: int, layers: Mapping[str, AdaptedLinear], first: int, width: int, rank: int, alpha: float
    ) -> None:
        """Build experts that add nothing yet.

        Args:
            count: N.
            layers: The linear layers to adapt, by a name without dots.
            first: The first of the base's layers that they belong to.
            width: W that a head reads.
            rank: Of each LoRA.
            alpha: Its scale, divided by the rank.
        """
        super().__init__()
        self.count = count
        self.first = first
        self.stacks = nn.ModuleDict(
            {
                name: LoraStack(count, layer.base.in_features, layer.base.out_features, rank, alpha)
                for name, layer in layers.items()
            }
        )
        self.head = nn.Parameter(torch.zeros(count, width))

    def scores(self, hidden: Tensor) -> Tensor:
        """A score per expert, `(B, N)`, of what heads read, `(B, N, W)`."""
        return (hidden * self.head).sum(-1)

    def copy_from(self, other: "LoraExperts") -> None:
        """Take over the LoRAs and heads of other experts of the same shape."""
        self.load_state_dict(other.state_dict())


@contextmanager
def attached(layers: Mapping[str, AdaptedLinear], experts: Sequence[LoraExperts], texts: int) -> Iterator[None]:
    """Let linear layers add what some experts have for them; of these only the last may be several.

    Args:
        layers: All adapted linear layers of the base, by name.
        experts: In the order in which they add.
        texts: B.
    """
    for name, layer in layers.items():
        layer.stacks = tuple(group.stacks[name] for group in experts if name in group.stacks)
        layer.texts = texts
    try:
        yield
    finally:
        for layer in layers.values():
            layer.stacks = ()
