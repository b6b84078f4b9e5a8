"""Reward models that DMoERM is compared with; all of them adapt the same frozen base by LoRA.

B texts, D the base's width, N members or objectives.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from tasks.reward.backbone import Backbone, Inputs, Reading
from tasks.reward.losses import bradley_terry_loss, capability_loss
from tasks.reward.units import Units
from zoo.base_models import MINILM
from zoo.errors import UnknownNameError
from zoo.moe.routers.base import require

MEMBERS, OBJECTIVES, GATE = "members", "objectives", "gate"
REDUCTIONS = ("mean", "worst", "uncertainty")
HUMAN = "human"
# How fast the running means of members follow their rewards; the rate falls to zero, so they end where these do.
MOMENTUM = 0.02
# Share of the preference in the reward that a gate starts with.
START = 0.9


def reduce_members(scores: Tensor, reduce: str, penalty: float) -> Tensor:
    """One reward of an ensemble's `(B, N)` (Coste et al. 2023, arXiv 2310.02743).

    Args:
        scores: The members' rewards.
        reduce: `mean`; `worst`, the lowest one; or `uncertainty`, the mean less `penalty` times the variance.
        penalty: For `uncertainty`.
    """
    if reduce == "worst":
        return scores.min(1).values
    mean = scores.mean(1)
    return mean - penalty * scores.var(1, correction=0) if reduce == "uncertainty" else mean


class LoraEnsemble(Backbone):
    """N reward models, each a LoRA and a head of its own, on one frozen base; all read a batch in one pass.

    They differ by how they start. One member is the usual reward model. A member's rewards are told apart by their
    differences alone, so each is centred by its mean over the training texts before several become one.
    """

    phases = (MEMBERS,)
    centre: Tensor

    def __init__(
        self,
        members: int = 1,
        reduce: Literal["mean", "worst", "uncertainty"] = "mean",
        penalty: float = 0.5,
        base: str = MINILM,
        base_sha256: str | None = None,
        layers: int = 1,
        rank: int = 16,
        head_decay: float = 0.0,
    ) -> None:
        """Build the members.

        Args:
            members: N.
            reduce: How their rewards become one, see `reduce_members`; it can be changed after training.
            penalty: Weight of the variance, for `uncertainty`.
            base: See `Backbone`.
            base_sha256: Likewise.
            layers: Last layers with LoRA; 0 is all.
            rank: Of each member.
            head_decay: Of each member's head, see `Backbone`.

        Raises:
            UnknownNameError: There is no such reduction.
            ValueError: There is no member, or the base has other or fewer layers.
        """
        if reduce not in REDUCTIONS:
            raise UnknownNameError("reduction of an ensemble", reduce, REDUCTIONS)
        require(members >= 1, "members", members, "must be at least 1")
        super().__init__(base, base_sha256, layers, head_decay)
        self.members = members
        self.reduce = reduce
        self.penalty = penalty
        self.layers = layers
        self.rank = rank
        self.experts = self.lora_experts(members, rank)
        # Heads that start at zero would leave members alike in all but A.
        nn.init.normal_(self.experts.head, std=self.width**-0.5)
        self.register_buffer("centre", torch.zeros(members))
        self.groups, self.group_of = {"all": []}, {}
        self.complete()

    def score_names(self, route: int) -> list[str]:
        """The members, numbered."""
        return [f"member {number}" for number in range(self.members)]

    def scores(self, inputs: Inputs) -> Tensor:
        """The members' centred rewards `(B, N)`."""
        return self.experts.scores(self.finish(inputs.streams, (self.experts,))) - self.centre

    def read(self, inputs: Inputs, oracle: bool = False) -> Reading:
        """Rewards and those of the members; see `Backbone.read`."""
        scores = self.scores(inputs)
        reward = reduce_members(scores, self.reduce, self.penalty)
        return Reading(reward, scores, torch.zeros(len(reward), dtype=torch.long, device=reward.device))

    def phase_parameters(self, phase: str) -> list[nn.Parameter]:
        """All that is added to the base."""
        return list(self.experts.parameters())

    def phase_loss(self, phase: str, inputs: Inputs, preferences: Tensor) -> tuple[Tensor, Tensor]:
        """The members' losses, added up, since they share nothing that is trained; see `Backbone.phase_loss`."""
        pairs, scores = len(preferences), self.scores(inputs)
        if torch.is_grad_enabled():
            self.centre += MOMENTUM * scores.detach().mean(0)
        loss = bradley_terry_loss(scores[:pairs], scores[pairs:]) * self.members
        loss = loss + self.head_decay * self.experts.head.square().sum()
        rewards = reduce_members(scores, self.reduce, self.penalty)
        return loss, rewards[:pairs] > rewards[pairs:]


class ObjectiveModel(Backbone):
    """One LoRA with a head per objective: what people prefer, and each capability.

    Without gate it is the multi-task model, whose reward is the first head's. With one the reward is a sum of all
    heads', weighted by the prompt as in ArmoRM (Wang et al. 2024, arXiv 2406.12845). There the heads learn ratings,
    here the same preferences as DMoERM's experts; the gate is learned at last, with all else frozen, as there. Like
    DMoERM's aggregation it starts at what people prefer, or almost, reads scores in their units, and may be held there.
    """

    labelled_phase = OBJECTIVES

    def __init__(
        self,
        capabilities: list[str],
        gate: bool = False,
        base: str = MINILM,
        base_sha256: str | None = None,
        layers: int = 1,
        rank: int = 16,
        gate_dim: int = 32,
        gate_decay: float = 0.0,
        head_decay: float = 0.0,
    ) -> None:
        """Build the model.

        Args:
            capabilities: Names of the objectives beside what people prefer.
            gate: Whether prompts weigh the objectives.
            base: See `Backbone`.
            base_sha256: Likewise.
            layers: Last layers with LoRA; 0 is all.
            rank: Of the LoRA.
            gate_dim: Hidden width of the gate.
            gate_decay: Weight of the squared weights of its last layer, which are zero at its start, in the loss of its
                phase.
            head_decay: Of the head for what people prefer, see `Backbone`.

        Raises:
            ValueError: There is no capability, the decay is negative or without a gate, or the base has other or fewer
                layers.
        """
        require(len(capabilities) >= 1, "capabilities", capabilities, "needs at least one")
        require(gate_decay >= 0 and (gate or not gate_decay), "gate_decay", gate_decay, "is at least 0, and of a gate")
        super().__init__(base, base_sha256, layers, head_decay)
        self.capabilities = capabilities
        self.capability_names = list(capabilities)
        self.gate = gate
        self.layers = layers
        self.rank = rank
        self.gate_dim = gate_dim
        self.gate_decay = gate_decay
        self.experts = self.lora_experts(1, rank)
        self.heads = nn.Linear(self.width, 1 + len(capabilities), bias=False)
        self.phases = (OBJECTIVES, GATE) if gate else (OBJECTIVES,)
        self.units = Units(1 + len(capabilities))
        self.gating = None
        if gate:
            last = nn.Linear(gate_dim, 1 + len(capabilities))
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            with torch.no_grad():
                last.bias[0] = math.log(START / (1 - START) * len(capabilities))
            self.gating = nn.Sequential(nn.Linear(self.prompt_width, gate_dim), nn.GELU(), last)
        self.groups, self.group_of = {"all": []}, {}
        self.complete()

    def score_names(self, route: int) -> list[str]:
        """The objectives."""
        return [HUMAN, *self.capabilities]

    def objective_scores(self, inputs: Inputs) -> Tensor:
        """The heads' scores `(B, 1 + U)`."""
        scores: Tensor = self.heads(self.finish(inputs.streams, (self.experts,))[:, 0])
        return scores

    def combine(self, scores: Tensor, prompts: Tensor) -> Tensor:
        """Rewards `(B,)` of the objectives' scores."""
        if self.gating is None:
            return scores[:, 0]
        return (torch.softmax(self.gating(prompts), dim=1) * self.units(scores)).sum(1)

    def read(self, inputs: Inputs, oracle: bool = False) -> Reading:
        """Rewards and the objectives' scores; see `Backbone.read`."""
        scores = self.objective_scores(inputs)
        route = torch.zeros(len(scores), dtype=torch.long, device=scores.device)
        return Reading(self.combine(scores, inputs.prompts), scores, route)

    @property
    def reads_prompts(self) -> bool:
        """Whether prompts weigh the objectives."""
        return self.gate

    def phase_parameters(self, phase: str) -> list[nn.Parameter]:
        """The gate, or all but it."""
        if phase == GATE:
            return [] if self.gating is None else list(self.gating.parameters())
        # The experts' own head has no use where there are several.
        return [*self.experts.stacks.parameters(), *self.heads.parameters()]

    def head_parameters(self) -> list[nn.Parameter]:
        """One for each objective."""
        return [self.heads.weight]

    def begin(self, phase: str) -> None:
        """Let the gate find scores alike."""
        if phase == GATE:
            self.units.settle()

    @torch.no_grad()
    def digest(self, phase: str, inputs: Inputs) -> Tensor | None:
        """The scores that the gate weighs, and the prompts by which it does; see `Backbone.digest`."""
        return torch.cat([self.objective_scores(inputs), inputs.prompts], dim=1) if phase == GATE else None

    def phase_loss(self, phase: str, inputs: Inputs, preferences: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of a phase; see `Backbone.phase_loss`."""
        pairs = len(preferences)
        if inputs.digest is None:
            scores, prompts = self.objective_scores(inputs), inputs.prompts
        else:
            scores, prompts = inputs.digest.split([1 + len(self.capabilities), self.prompt_width], dim=1)
        rewards = self.combine(scores, prompts) if phase == GATE else scores[:, 0]
        loss = bradley_terry_loss(rewards[:pairs], rewards[pairs:])
        if phase == GATE and self.gating is not None:
            loss = loss + self.gate_decay * self.gating[2].weight.square().sum()  # type: ignore[operator]
        if phase == OBJECTIVES:
            if torch.is_grad_enabled():
                self.units.follow(scores[:pairs].detach() - scores[pairs:].detach())
            # They share one LoRA, in which what people prefer weighs as much as all capabilities together.
            own = capability_loss(scores[:pairs, 1:], scores[pairs:, 1:], preferences)
            loss = loss + self.head_decay * self.heads.weight[0].square().sum()
            loss = (loss + own / len(self.capabilities)) / 2
        return loss, rewards[:pairs] > rewards[pairs:]
