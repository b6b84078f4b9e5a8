"""DMoERM, a double-layer mixture of experts as a reward model (Quan 2024, arXiv 2403.01197).

Plain torch. B texts (a prompt and an answer each) of L tokens, D the base's width, W = 3 D what a head reads (see
`tasks.reward.backbone`), G groups of categories, each with an inner model, T capabilities.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tasks.reward.backbone import Backbone, Inputs, Reading, Streams, split_read, stack_names
from tasks.reward.capabilities import PREFERENCE_ITSELF
from tasks.reward.lora import LoraExperts
from tasks.reward.losses import bradley_terry_loss, capability_loss
from tasks.reward.units import Units
from zoo.base_models import MINILM
from zoo.errors import UnknownNameError
from zoo.moe import DenseRouter, ModuleExperts, MoELayer, RoutingOutput, TopKRouter
from zoo.moe.routers.base import require

ROUTER, JOINT, TASK, CAPABILITY, WEIGH, AGGREGATE = "router", "joint", "task", "capability", "weigh", "aggregate"
PHASES = (ROUTER, JOINT, TASK, CAPABILITY, WEIGH, AGGREGATE)
AGGREGATES = ("hidden", "score")
STARTS = ("preference", "random")
# What the score of the general expert is called.
GENERAL = "general"

Finish = Callable[[Streams, Sequence[LoraExperts]], Tensor]
# Of each of `Streams`, the dimensions of a text's part.
UNIT_NDIMS = (2, 1, 1)


class CapabilityExperts(nn.Module):
    """T LoRA experts over one task model, as experts of a `MoELayer` that runs all of them: one stacked pass.

    A unit is a text: its states `(L, D)`, its mask `(L,)` and their means `(2 D,)`.
    """

    unit_ndims = UNIT_NDIMS
    backend = "dense"

    def __init__(self, finish: Finish, task: LoraExperts, experts: LoraExperts, shared: bool) -> None:
        """Put them together.

        Args:
            finish: `Backbone.finish`.
            task: The task model's LoRA, which they are trained on top of.
            experts: The T experts.
            shared: Whether they are other inner models' too.
        """
        super().__init__()
        self.finish = finish
        self.num_experts = experts.count
        # In a tuple, as they are parts of others.
        self.used = (task, experts)
        if not shared:
            self.experts = experts

    def forward_all(self, streams: Sequence[Tensor]) -> Tensor:
        """What heads read of all texts under all experts, `(B, T, W)`."""
        hidden, mask, means = streams
        return self.finish((hidden, mask, means), self.used)


class InnerModel(nn.Module):
    """The reward model of one group of categories: a dense mixture of capability experts, combined to a reward.

    Attributes:
        task: LoRA and head of phase 1, one expert.
        mixture: The capability experts; what they make of a text is concatenated. None without capabilities.
        own: Places of the expert of the preference, if there is one.
        units: Of the experts' scores, as they were when `weigh`, or without it the aggregation, began to learn.
        weights: `(T,)`, how much each score counts, as `weigh` has found it; None where no linear map reads scores.
        combine: Maps these states, or the experts' scores in their units, to the reward: an MLP, or a linear map.
    """

    own: Tensor

    def __init__(
        self,
        finish: Finish,
        task: LoraExperts,
        experts: LoraExperts | None,
        names: Sequence[str],
        width: int,
        aggregate: str,
        shared: bool = False,
    ) -> None:
        """Put it together; see `DMoERM`."""
        super().__init__()
        own = [place for place, name in enumerate(names) if name == PREFERENCE_ITSELF]
        self.register_buffer("own", torch.tensor(own, dtype=torch.long), persistent=False)
        self.finish = finish
        self.task = task
        self.aggregate = aggregate
        self.mixture: MoELayer | None = None
        self.weights: nn.Parameter | None = None
        if experts is not None:
            self.units = Units(experts.count)
            if aggregate == "score" and not width:
                self.weights = nn.Parameter(torch.zeros(experts.count))
            parts: Any = CapabilityExperts(finish, task, experts, shared)
            self.mixture = MoELayer(DenseRouter(experts.count), parts, combine="concat")
            last, means = (part.shape[1] for part in split_read(experts.head))
            # The means are the same under all experts.
            inputs = experts.count * last + means if aggregate == "hidden" else experts.count
            self.combine: nn.Module = nn.Linear(inputs, 1, bias=False)
            if width:
                self.combine = nn.Sequential(nn.Linear(inputs, width), nn.PReLU(), nn.Linear(width, 1))

    @property
    def experts(self) -> LoraExperts:
        """The capability experts; without any, the task model."""
        return self.task if self.mixture is None else self.mixture.experts.used[1]  # type: ignore[index,return-value]

    def task_rewards(self, streams: Streams) -> Tensor:
        """The task model's rewards `(B,)`."""
        return self.task.scores(self.finish(streams, (self.task,)))[:, 0]

    def states(self, streams: Streams) -> Tensor:
        """What heads read under the capability experts, `(B, T, W)`."""
        if self.mixture is None:
            raise ValueError("This inner model has no capability experts.")
        out: Tensor = self.mixture(streams, router_input=streams[0][:, 0])
        return out.unflatten(1, (self.experts.count, -1))

    @property
    def heads(self) -> Tensor:
        """What reads the experts' scores, `(T, W)`; that of the preference is the task model's."""
        return self.experts.head.index_copy(0, self.own, self.task.head.expand(len(self.own), -1))

    def capability_scores(self, streams: Streams) -> Tensor:
        """The capability experts' rewards `(B, T)`."""
        return (self.states(streams) * self.heads).sum(-1)

    def weighed(self, scores: Tensor) -> Tensor:
        """What the scores `(B, T)` of those say that have not learned what people prefer, `(B,)`."""
        if self.weights is None:
            raise ValueError("This inner model has no linear map of its experts' scores.")
        return (self.units(scores) * self.weights.index_fill(0, self.own, 0)).sum(1)

    def start(self) -> Tensor:
        """The linear map that is the score of the expert of the preference, or without one the mean of all.

        After `weigh` it is the mean of that and of what it has learned that the other experts say.
        """
        experts = self.own.tolist() or list(range(self.experts.count))
        weights = self.units.value.new_zeros(self.experts.count)
        weights[experts] = 1 / len(experts)
        if self.weights is not None and self.weights.any():
            return (weights * self.units.value + self.weights.index_fill(0, self.own, 0)) / 2
        if self.aggregate == "score":
            return weights * self.units.value
        last, means = split_read(weights[:, None] * self.heads)
        return torch.cat([last.flatten(), means.sum(0)])

    def distance(self) -> Tensor:
        """The squared distance of a linear map of scores from its start, but for the weight of the preference's.

        What has learned from few pairs is too sure of these, so that its weight has to be free to fall.
        """
        moved: Tensor = self.combine.weight[0] - self.start().detach()  # type: ignore[operator,union-attr]
        return moved.index_fill(0, self.own, 0).square().sum()

    @torch.no_grad()
    def begin(self) -> None:
        """Let the aggregation begin as its start; an MLP's other hidden units are not heard yet.

        PReLU of slope s makes a number of z and -z whose difference is (1 + s) z.
        """
        row = self.start()
        if isinstance(self.combine, nn.Linear):
            self.combine.weight[0] = row
            return
        first, act, second = self.combine  # type: ignore[misc]
        first.weight[:2] = torch.stack([row, -row])
        first.bias[:2] = 0
        second.weight.zero_()
        second.bias.zero_()
        slope = 1 / (1 + float(act.weight))
        second.weight[0, :2] = torch.tensor([slope, -slope])

    def forward(self, streams: Streams) -> Tensor:
        """The reward and, after it, the experts' scores, `(B, 1 + T)`."""
        if self.mixture is None:
            return self.task_rewards(streams)[:, None]
        return self.aggregated(self.digest(streams))

    def digest(self, streams: Streams) -> Tensor:
        """What the aggregation reads, which is nothing if it reads scores alone, and the scores: `(B, X + T)`."""
        if self.aggregate == "score":
            return self.capability_scores(streams)
        states = self.states(streams)
        last, means = split_read(states)
        return torch.cat([last.flatten(1), means[:, 0], (states * self.heads).sum(-1)], dim=1)

    def aggregated(self, digest: Tensor) -> Tensor:
        """The reward and the scores, `(B, 1 + T)`, of a digest."""
        count = self.experts.count
        read, scores = digest.split([digest.shape[1] - count, count], dim=1)
        reward = self.combine(self.units(scores) if self.aggregate == "score" else read)
        return torch.cat([reward, scores], dim=1)


class DMoERM(Backbone):
    """A sparse router sends a text by its prompt to one inner model, in which a dense mixture finds its reward.

    A general expert, if there is one, is always on, as the shared experts of DeepSeekMoE (Dai et al. 2024, arXiv
    2401.06066): what it says is added to what the inner model says, so that less depends on the route.

    The phases, each of which leaves everything else byte-identical:

    - `router`: the outer router learns the groups of prompts;
    - `joint`: the general expert learns from all groups' pairs, or where there is none the task model that all inner
      models start from (not in the paper, whose base is large enough to learn a category by itself);
    - `task`: each inner model's LoRA learns its own group's pairs (the paper's phase 1, there a copy of the base);
    - `capability`: T experts learn a capability each, on top of the frozen task model, their heads copies of its own
      (or, where all inner models share them, of the mean of theirs);
    - `weigh`: how much each capability counts, where a linear map combines scores (not in the paper). Their experts
      learn nothing of what people prefer, so that all pairs may teach it, but not how much a task model's word counts;
    - `aggregate`: the MLP, or a linear map, learns the pairs, all experts frozen; and, apart from it, how sure the
      general expert may be of what it says.

    With one group and no capabilities it is a single reward model with one LoRA: the twin.
    """

    phases = PHASES
    labelled_phase = CAPABILITY
    columns: Tensor

    def __init__(
        self,
        groups: dict[str, list[str]],
        capabilities: list[str] | dict[str, list[str]] | None = None,
        base: str = MINILM,
        base_sha256: str | None = None,
        task_layers: int = 1,
        task_rank: int = 16,
        capability_layers: int = 1,
        capability_rank: int = 8,
        share_capabilities: bool = False,
        general_rank: int = 0,
        general_members: int = 1,
        aggregate: Literal["hidden", "score"] = "hidden",
        aggregate_dim: int = 64,
        aggregate_start: Literal["preference", "random"] = "preference",
        aggregate_decay: float = 0.0,
        router_dim: int = 32,
        head_decay: float = 0.0,
    ) -> None:
        """Build the model on a frozen base.

        Args:
            groups: The categories of each inner model, by its name; see `tasks.reward.groups.merge_categories`.
            capabilities: Names of the T capabilities, the same for all inner models, or by the inner model's name and
                as many for each; see `RewardDataModule.label`. None is without.
            base: A folder, or a name on the hub; see `Backbone`.
            base_sha256: What its weights must be. None allows any, and is filled in.
            task_layers: Last layers with the task models' LoRA, and the general expert's; 0 is all.
            task_rank: Its rank.
            capability_layers: Last layers with the capability experts' LoRA; 0 is all. What is below runs once for
                all of them.
            capability_rank: Their rank.
            share_capabilities: Whether all inner models have the same experts, which then learn from all pairs; how
                they are combined, and the task model below them, stays each one's own.
            general_rank: Rank of the LoRAs of a general expert, which learns what people prefer from all groups' pairs.
                0 is without.
            general_members: How many LoRAs it has, which learn the same and differ by how they start: what it says is
                the mean of what they say, which errs less than they do.
            aggregate: Whether what combines them reads the experts' last states and the text's means (the released
                code: last states) or their scores.
            aggregate_dim: Its hidden width, at least 2; the released code has D. 0 is a linear map in place of an MLP.
            aggregate_start: How it begins its phase: as the score of the expert of the capability `preference`, or
                without one the mean of all scores; after `weigh` halfway between that and what the other experts say;
                or at random (the released code).
            aggregate_decay: Weight of the squared distance of a linear map of scores from its start in the loss of its
                phase, so that few pairs of a rare kind move it less; how loud what has learned the preference is stays
                free.
            router_dim: Hidden width of the router.
            head_decay: Of the task models and the general expert, see `Backbone`.

        Raises:
            UnknownNameError: There is no such aggregate or start.
            ValueError: There is no group, a category is in two, inner models differ in the number of capabilities or
                are to share different ones, the base has other or fewer layers, or an argument does not fit another.
            DataNotFoundError: The base is nowhere.
            CheckpointError: It has other weights.
        """
        if aggregate not in AGGREGATES:
            raise UnknownNameError("aggregate", aggregate, AGGREGATES)
        if aggregate_start not in STARTS:
            raise UnknownNameError("start of the aggregation", aggregate_start, STARTS)
        require(aggregate_dim == 0 or aggregate_dim >= 2, "aggregate_dim", aggregate_dim, "must be 0 or at least 2")
        require(aggregate_decay >= 0, "aggregate_decay", aggregate_decay, "must not be negative")
        if aggregate_decay:
            rule = (
                "is for a linear map of scores (capabilities, aggregate='score', aggregate_dim=0) with a start "
                "(aggregate_start='preference')"
            )
            linear = bool(capabilities) and aggregate == "score" and aggregate_dim == 0
            held = linear and aggregate_start == "preference"
            require(held, "aggregate_decay", aggregate_decay, rule)
        require(len(groups) >= 1, "groups", groups, "needs at least one inner model")
        layers = 0 if 0 in (task_layers, capability_layers) else max(task_layers, capability_layers)
        super().__init__(base, base_sha256, layers, head_decay)
        self.groups = groups
        self.capabilities = capabilities or []
        self.names = capability_names(self.capabilities, list(groups))
        self.capability_names = list(dict.fromkeys(name for names in self.names for name in names))
        places = [[self.capability_names.index(name) for name in names] for names in self.names]
        self.register_buffer("columns", torch.tensor(places, dtype=torch.long), persistent=False)
        self.task_layers = task_layers
        self.task_rank = task_rank
        self.capability_layers = capability_layers
        self.capability_rank = capability_rank
        self.share_capabilities = share_capabilities
        self.general_rank = general_rank
        self.general_members = general_members
        self.aggregate = aggregate
        self.aggregate_dim = aggregate_dim
        self.aggregate_start = aggregate_start
        self.aggregate_decay = aggregate_decay
        self.router_dim = router_dim
        self.group_of = stack_names(groups)
        self.prompt_body = nn.Sequential(nn.Linear(self.prompt_width, router_dim), nn.GELU())
        self.general: LoraExperts | None = None
        if not general_rank:
            require(general_members == 1, "general_members", general_members, "takes general_rank, which is 0")
        else:
            rule = f"is 0 or more, and takes capabilities, of which none is called {GENERAL!r}"
            fits = self.capability_names and GENERAL not in self.capability_names
            require(general_rank > 0 and bool(fits), "general_rank", general_rank, rule)
            require(general_members >= 1, "general_members", general_members, "must be at least 1")
            self.general = self.lora_experts(general_members, general_rank, layers=task_layers)
            # What has learned from few pairs is too sure of them: `aggregate` finds out on others by how much.
            self.general_scale = nn.Parameter(torch.ones(()))
            if general_members > 1:
                # Heads that start at zero would leave members alike in all but A.
                nn.init.normal_(self.general.head, std=self.width**-0.5)
        self.shared: LoraExperts | None = None
        if share_capabilities:
            count = len(self.capability_names)
            rule = "takes capabilities, the same for all inner models"
            alike = count and all(names == self.names[0] for names in self.names)
            require(bool(alike), "share_capabilities", share_capabilities, rule)
            self.shared = self.lora_experts(count, capability_rank, layers=capability_layers)
        inner = [self.build_inner(names) for names in self.names]
        self.outer = MoELayer(
            TopKRouter(router_dim, len(inner), 1, normalize=False),
            ModuleExperts(inner, stream=[-1] * len(inner), unit_ndims=UNIT_NDIMS),
            combine="select",
        )
        self.complete()

    def build_inner(self, names: Sequence[str]) -> InnerModel:
        """A new inner model with these capabilities."""
        task = self.lora_experts(1, self.task_rank, layers=self.task_layers)
        experts, shared = self.shared, self.shared is not None
        if names and experts is None:
            experts = self.lora_experts(len(names), self.capability_rank, layers=self.capability_layers)
        return InnerModel(self.finish, task, experts, names, self.aggregate_dim, self.aggregate, shared)

    @property
    def joint_experts(self) -> LoraExperts:
        """What learns from the pairs of all groups together."""
        return self.inner[0].task if self.general is None else self.general

    @property
    def inner(self) -> list[InnerModel]:
        """The inner models in the order of the groups."""
        return list(self.outer.experts.experts)  # type: ignore[arg-type]

    def route(self, prompts: Tensor) -> Tensor:
        """The router's logits `(B, G)` of what `read_prompts` gives, `(B, P)`."""
        logits: Tensor = self.outer.router(self.prompt_body(prompts)).router_logits
        return logits

    def general_scores(self, streams: Streams) -> Tensor:
        """What the general expert says, the mean of its members, `(B, 1)`; nothing, `(B, 0)`, without one."""
        if self.general is None:
            return streams[2].new_zeros(len(streams[2]), 0)
        return self.general.scores(self.finish(streams, (self.general,))).mean(1, keepdim=True)

    def add_general(self, inner: Tensor, general: Tensor) -> Tensor:
        """The rewards `(B,)`, of those of the inner models and what `general_scores` gives."""
        return inner if self.general is None else inner + self.general_scale * general[:, 0]

    def score_names(self, route: int) -> list[str]:
        """The capabilities of an inner model, and the general expert."""
        return self.names[route] if self.general is None else [*self.names[route], GENERAL]

    def read(self, inputs: Inputs, oracle: bool = False) -> Reading:
        """Rewards, and what they are made of; see `Backbone.read`."""
        features = self.prompt_body(inputs.prompts)
        decided = self.outer.router(features)
        route = decided.expert_index[:, 0]
        used = decided
        if oracle:
            known = torch.where(inputs.groups >= 0, inputs.groups, route)
            used = forced(known, len(self.groups))
        out = self.outer(inputs.streams, router_input=features, routing=used)
        general = self.general_scores(inputs.streams)
        return Reading(self.add_general(out[:, 0], general), torch.cat([out[:, 1:], general], dim=1), route)

    @property
    def reads_prompts(self) -> bool:
        """Whether there is anything to route."""
        return len(self.groups) > 1

    def check_plan(self, plan: Sequence[str], pretrained: str | None) -> None:
        """Refuse phases that would have no effect, or undo what others have learned; see `Backbone.check_plan`."""
        for phase in ([JOINT] if self.general is None and len(self.groups) > 1 else []) + [WEIGH]:
            if pretrained and phase in plan:
                raise ValueError(
                    f"epochs with {phase!r}: it makes what a later phase starts from, and that of {pretrained} has "
                    "gone its own way: leave it out."
                )
        if WEIGH in plan and (AGGREGATE not in plan or self.aggregate_start == "random"):
            raise ValueError(
                f"epochs with {WEIGH!r} need {AGGREGATE!r}, which starts from it, and aggregate_start='preference'; "
                f"found phases {', '.join(dict.fromkeys(plan))} and aggregate_start={self.aggregate_start!r}."
            )
        super().check_plan(plan, pretrained)

    def needed_phases(self, plan: Sequence[str]) -> list[str]:
        """All but `weigh`, of what it has; `joint` may train the task model of a single group."""
        general, several = self.general is not None, len(self.groups) > 1
        needed = {
            ROUTER: several,
            JOINT: general,
            TASK: several or general or JOINT not in plan,
            CAPABILITY: bool(self.capability_names),
            AGGREGATE: bool(self.capability_names),
        }
        return [phase for phase, is_needed in needed.items() if is_needed]

    def phase_parameters(self, phase: str) -> list[nn.Parameter]:
        """What a phase trains."""
        if phase == ROUTER:
            return [*self.prompt_body.parameters(), *self.outer.router.parameters()] if self.reads_prompts else []
        if phase == JOINT:
            return list(self.joint_experts.parameters())
        if phase == TASK:
            return [parameter for model in self.inner for parameter in model.task.parameters()]
        if phase == WEIGH:
            return [model.weights for model in self.inner if model.weights is not None]
        with_experts = [model for model in self.inner if model.mixture is not None]
        parts = [model.experts if phase == CAPABILITY else model.combine for model in with_experts]
        # Shared ones once.
        found = list(dict.fromkeys(parameter for part in parts for parameter in part.parameters()))
        return found + ([self.general_scale] if phase == AGGREGATE and self.general is not None else [])

    @torch.no_grad()
    def begin(self, phase: str) -> None:
        """Start a phase from what the one before it has learned."""
        if phase == TASK:
            for model in self.inner[1:]:
                # All start alike: from what `joint` has made of the first, or from the same untrained LoRA.
                model.task.copy_from(self.inner[0].task)
        if phase == CAPABILITY:
            heads = [model.task.head for model in self.inner]
            for model, head in zip(self.inner, heads, strict=True):
                start = torch.stack(heads).mean(0) if self.share_capabilities else head
                model.experts.head.copy_(start.expand_as(model.experts.head))
        if phase in (WEIGH, AGGREGATE):
            for model in self.inner:
                model.units.settle()
                if phase == AGGREGATE and self.aggregate_start == "preference":
                    model.begin()

    def phase_loss(self, phase: str, inputs: Inputs, preferences: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of a phase; see `Backbone.phase_loss`."""
        pairs = len(preferences)
        if phase == ROUTER:
            logits, wanted = self.route(inputs.prompts[:pairs]), inputs.groups[:pairs]
            return nn.functional.cross_entropy(logits, wanted), logits.argmax(1) == wanted
        if phase == CAPABILITY:
            return self.capability_phase_loss(inputs, preferences)
        rewards, total = self.learning_rewards(phase, inputs)
        # Members of the general expert, or it and the inner models, learn apart: their losses are added up.
        loss = bradley_terry_loss(rewards[:pairs], rewards[pairs:]) * rewards.shape[1]
        learning = [self.inner[number] for number in inputs.groups.unique().tolist()]
        if phase in (JOINT, TASK):
            experts = [self.joint_experts] if phase == JOINT else [model.task for model in learning]
            loss = loss + self.head_decay * torch.stack([of.head.square().sum() for of in experts]).mean()
        elif phase == AGGREGATE and self.aggregate_decay:
            loss = loss + self.aggregate_decay * torch.stack([model.distance() for model in learning]).mean()
        return loss, total[:pairs] > total[pairs:]

    def capability_phase_loss(self, inputs: Inputs, preferences: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of the capability experts, and which decisions were right."""
        pairs = len(preferences)
        scores = self.by_group(inputs.groups, inputs.streams, InnerModel.capability_scores)
        chosen, rejected = scores[:pairs], scores[pairs:]
        # Groups have capabilities of their own: the loss is that of each group's, added up.
        groups = inputs.groups[:pairs]
        wanted = preferences.gather(1, self.columns[groups])
        losses = []
        for number in groups.unique().tolist():
            rows = groups == number
            if torch.is_grad_enabled():
                self.inner[number].units.follow(chosen[rows] - rejected[rows])
            losses.append(capability_loss(chosen[rows], rejected[rows], wanted[rows]))
        return torch.stack(losses).sum(), ((chosen - rejected) * wanted > 0)[wanted != 0]

    def learning_rewards(self, phase: str, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """What a phase teaches what people prefer: the rewards `(2B, N)` of N parts, and those of them together."""
        if phase == JOINT:
            rewards = self.joint_experts.scores(self.finish(inputs.streams, (self.joint_experts,)))
            return rewards, rewards.mean(1)
        if phase == TASK:
            rewards = self.by_group(inputs.groups, inputs.streams, InnerModel.task_rewards)
            return rewards[:, None], rewards
        digest = self.digest(phase, inputs) if inputs.digest is None else inputs.digest
        if phase == WEIGH:
            rewards = self.by_group(inputs.groups, (digest,), ask_weighed)
            return rewards[:, None], rewards
        count = int(self.general is not None)
        inner, general = digest.split([digest.shape[1] - count, count], dim=1)
        rewards = self.by_group(inputs.groups, (inner,), ask_aggregated)
        if self.general is None:
            return rewards[:, None], rewards
        return torch.cat([rewards[:, None], self.general_scale * general], dim=1), self.add_general(rewards, general)

    @torch.no_grad()
    def digest(self, phase: str, inputs: Inputs) -> Tensor | None:
        """What combines experts reads; see `Backbone.digest`."""
        if phase not in (WEIGH, AGGREGATE):
            return None
        inner = self.by_group(inputs.groups, inputs.streams, InnerModel.digest)
        # What weighs capabilities does not hear the general expert.
        return inner if phase == WEIGH else torch.cat([inner, self.general_scores(inputs.streams)], dim=1)

    def by_group(self, groups: Tensor, parts: tuple[Tensor, ...], ask: Callable[[InnerModel, Any], Tensor]) -> Tensor:
        """What each text's own inner model answers, `(B, ...)`.

        Args:
            groups: `(B,)`.
            parts: `(B, ...)` each.
            ask: Called with an inner model and its rows of these.
        """
        places, answers = [], []
        for number, model in enumerate(self.inner):
            rows = (groups == number).nonzero()[:, 0]
            if len(rows):
                places.append(rows)
                answers.append(ask(model, tuple(part[rows] for part in parts)))
        return torch.cat(answers)[torch.cat(places).argsort()]


def ask_aggregated(model: InnerModel, parts: tuple[Tensor]) -> Tensor:
    """Rewards `(B,)` of a digest."""
    return model.aggregated(*parts)[:, 0]


def ask_weighed(model: InnerModel, parts: tuple[Tensor]) -> Tensor:
    """What its experts say of a digest, which is their scores, `(B,)`."""
    return model.weighed(*parts)


def capability_names(capabilities: list[str] | dict[str, list[str]], groups: Sequence[str]) -> list[list[str]]:
    """The capabilities of each inner model.

    Args:
        capabilities: Of all, or by the inner model's name.
        groups: Names of the inner models.

    Raises:
        UnknownNameError: An inner model that is named does not exist.
        ValueError: One has no capabilities where others have, or another number of them, or one twice.
    """
    if isinstance(capabilities, list):
        capabilities = {group: capabilities for group in groups}
    for name in capabilities:
        if name not in groups:
            raise UnknownNameError("inner model with capabilities", name, groups)
    names = [list(capabilities.get(group, [])) for group in groups]
    counts = {group: len(of) for group, of in zip(groups, names, strict=True)}
    if len(set(counts.values())) > 1 or any(len(set(of)) < len(of) for of in names):
        raise ValueError(f"capabilities: every inner model needs the same number of different ones; found {counts}.")
    return names


def forced(groups: Tensor, count: int) -> RoutingOutput:
    """The decision that sends each of B texts to a given inner model.

    Args:
        groups: `(B,)` int64.
        count: G.
    """
    index, one_hot = groups[:, None], nn.functional.one_hot(groups, count).float()
    return RoutingOutput(index, torch.ones_like(index, dtype=torch.float32), index, one_hot, one_hot, count)


def category_numbers(groups: Mapping[str, int], categories: Sequence[str], unknown: int = -1) -> Tensor:
    """The inner model of each category, `(B,)` int64.

    Args:
        groups: By category.
        categories: B of them.
        unknown: Of a category that has none.
    """
    return torch.tensor([groups.get(category, unknown) for category in categories])
