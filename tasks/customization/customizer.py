"""Learning one user's handwriting on the user's own device: the local expert, the gate, and its threshold.

Both are fitted by plain SGD with momentum on cached features of the frozen global expert. K models that each leave a
fold of the samples out, and the final one that leaves out none, are fitted side by side as one stacked tensor: what
the gate learns from and what the threshold is chosen on are then predictions for samples that a model has not seen,
so that every sample serves for training and for validation.

`learn` holds the data loop, the schedule, the stopping rule and the choice of the threshold. What runs the networks and
follows gradients is a `Backend`: PyTorch here, ExecuTorch's runtime in `on_device`.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from tasks.customization.model import CustomizedLeNet, Features, gate_input
from zoo.moe.routers.base import require

# The least that makes sense of each whole number in `Recipe`.
LEAST = {"folds": 2, "copies": 0, "expert_steps": 1, "gate_steps": 1, "expert_batch": 1, "gate_batch": 1}
# Learning rates tried, each a quarter of the last.
ATTEMPTS = 4
MOMENTUM = 0.9

Progress = Callable[[str, int, int], None]
# Of one step: what is drawn from the samples and the replay buffer, in the order in which the losses read it.
Batch = tuple[Tensor, ...]
Loss = Callable[[Sequence[Tensor], Batch], Tensor]


@dataclass(frozen=True, slots=True)
class Recipe:
    """Hyperparameters of customization, chosen on validation parts.

    Attributes:
        folds: K.
        copies: Augmented copies of every sample beside the original.
        expert_steps: SGD steps of the local expert.
        expert_rate: Its peak learning rate.
        gate_steps: SGD steps of the gate.
        gate_rate: Its peak learning rate.
        expert_batch: User samples per step of the local expert, and as many from the replay buffer.
        gate_batch: The same for the gate.
        weight_decay: Of both.
        replay_weight: Weight of the distillation of the global expert on the replay buffer.
        max_drop: Drop of generic accuracy, in percentage points, that the threshold may cost as estimated on the
            replay buffer.
        max_route: Share of the replay buffer that the threshold may let through.
        confidence: The gate opens only if repaired samples outnumber broken ones by this many standard deviations.
    """

    folds: int = 4
    copies: int = 4
    expert_steps: int = 1000
    expert_rate: float = 0.2
    gate_steps: int = 400
    gate_rate: float = 0.3
    expert_batch: int = 64
    gate_batch: int = 128
    weight_decay: float = 1e-3
    replay_weight: float = 1.0
    max_drop: float = 0.3
    max_route: float = 0.05
    confidence: float = 0.5

    def __post_init__(self) -> None:
        """Refuse values that nothing can be learned with.

        Raises:
            ValueError: A value is not allowed; the message names it.
        """
        for name, least in LEAST.items():
            value = getattr(self, name)
            require(isinstance(value, int) and value >= least, name, value, f"must be a whole number, at least {least}")
        for name in ("expert_rate", "gate_rate"):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be positive")
        for name in ("weight_decay", "replay_weight", "max_drop", "confidence"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        require(0 <= self.max_route <= 1, "max_route", self.max_route, "must be between 0 and 1")


@dataclass(frozen=True, slots=True)
class Learned:
    """What one user's samples teach.

    Attributes:
        down: `(width, rank)` of the local expert.
        up: `(rank, C)`.
        bias: `(C,)`.
        weight: `(num_early + 13,)` of the gate.
        offset: `()`.
        threshold: `()`, the probability above which the local expert answers.
    """

    down: Tensor
    up: Tensor
    bias: Tensor
    weight: Tensor
    offset: Tensor
    threshold: Tensor


class Learner(Protocol):
    """Parameters under SGD with momentum and weight decay on one of the two losses."""

    def begin(self, start: Sequence[Tensor]) -> None:
        """Set the parameters and forget all momentum."""

    def step(self, batch: Batch, rate: float) -> float:
        """Take a step at a learning rate; the loss before it."""

    def parameters(self) -> list[Tensor]:
        """The parameters as they are now."""


class Backend(Protocol):
    """What runs the networks and follows gradients on a device."""

    @property
    def num_classes(self) -> int:
        """C."""

    @property
    def rank(self) -> int:
        """Rank of the local expert's correction."""

    def features(self, images: Tensor) -> Features:
        """Run the global expert on images `(N, 1, 28, 28)`."""

    def warp(self, images: Tensor, maps: Tensor) -> Tensor:
        """Draw images `(N, 1, 28, 28)` anew under affine maps `(N, 2, 3)` from new to old coordinates."""

    def replay(self) -> tuple[Features, Tensor]:
        """Features and labels `(n,)` of generic images."""

    def expert_learner(self, recipe: "Recipe") -> Learner:
        """Learns the stacked local experts by `expert_loss`."""

    def gate_learner(self, recipe: "Recipe") -> Learner:
        """Learns the stacked gates by `gate_loss`."""


def customize(
    model: CustomizedLeNet,
    images: Tensor,
    labels: Tensor,
    *,
    seed: int = 0,
    recipe: Recipe | None = None,
    progress: Progress | None = None,
) -> CustomizedLeNet:
    """Learn a local expert and a gate from one user's samples; the model given and its global expert stay as they are.

    Where the user's own samples do not say that the local expert helps, the gate of the result stays closed.

    Args:
        model: A model with a filled replay buffer.
        images: `(N, 1, 28, 28)` in 0..1, the user's training and validation samples.
        labels: `(N,)` merged labels.
        seed: Seed of folds, augmentation and batches.
        recipe: Hyperparameters.
        progress: Called with the phase, the step and the number of steps.

    Returns:
        A copy of the model, in eval mode, with local expert, gate and threshold learned.

    Raises:
        ValueError: There are fewer samples than folds, labels that are no classes of the model, images without ink, or
            learning diverged.
    """
    with one_thread(), torch.inference_mode(False), torch.no_grad():
        customised = copy.deepcopy(model).eval()
        learned = learn(TorchBackend(customised), images, labels, seed=seed, recipe=recipe, progress=progress)
        keep(customised, learned)
    return customised


def learn(
    backend: Backend,
    images: Tensor,
    labels: Tensor,
    *,
    seed: int = 0,
    recipe: Recipe | None = None,
    progress: Progress | None = None,
) -> Learned:
    """As `customize`, on any backend: what was learned instead of a model."""
    recipe = recipe or Recipe()
    check_samples(backend, images, labels, recipe)
    return _Customization(backend, recipe, seed, progress or (lambda phase, step, steps: None)).run(images, labels)


@torch.no_grad()
def keep(model: CustomizedLeNet, learned: Learned) -> None:
    """Write what was learned into a model."""
    expert, gate = model.local_expert, model.gate.linear
    expert.down.copy_(learned.down)
    expert.up.copy_(learned.up)
    expert.bias.copy_(learned.bias)
    gate.weight.copy_(learned.weight[None])
    gate.bias.copy_(learned.offset)
    model.threshold.copy_(learned.threshold)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: on matrices this small several threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check_samples(model: CustomizedLeNet | Backend, images: Tensor, labels: Tensor, recipe: Recipe) -> None:
    """Raise a `ValueError` for samples that nothing can be learned from."""
    if len(images) < recipe.folds:
        raise ValueError(f"There are {len(images)} samples; customization needs at least {recipe.folds}. Write more.")
    if images.shape[1:] != (1, 28, 28):
        raise ValueError(
            f"images has shape {tuple(images.shape)}; expected (N, 1, 28, 28), white ink on black in 0..1."
        )
    blank = (~(images.flatten(1).amax(1) > 0)).nonzero().flatten().tolist()
    if blank:
        raise ValueError(f"Images {blank[:5]} hold no ink ({len(blank)} in all): leave them out.")
    wrong = labels[(labels < 0) | (labels >= model.num_classes)].unique().tolist()
    if wrong:
        raise ValueError(f"Labels {wrong} are no classes of the model; allowed are 0..{model.num_classes - 1}.")


class _Customization:
    """One run of `learn`: its random generator, its replay buffer and its folds."""

    def __init__(self, backend: Backend, recipe: Recipe, seed: int, progress: Progress) -> None:
        self.backend = backend
        self.recipe = recipe
        self.random = torch.Generator().manual_seed(seed)
        self.progress = progress
        # Model k leaves fold k out; the last one leaves out nothing.
        self.stack = torch.arange(recipe.folds + 1)[:, None]
        self.replay, self.replay_labels = backend.replay()
        self.replay_fold = torch.randperm(len(self.replay_labels), generator=self.random) % recipe.folds

    def run(self, images: Tensor, labels: Tensor) -> Learned:
        copies = [self.backend.features(images)]
        for _ in range(self.recipe.copies):
            copies.append(self.backend.features(self.backend.warp(images, draw_maps(len(images), self.random))))
        user = copies[0]
        fold = deal_folds(labels, self.recipe.folds, self.random)
        down, up, bias = self.fit_expert(copies, labels, fold)
        local_user = unseen(correct(user, down, up, bias), fold)
        local_replay = unseen(correct(self.replay, down, up, bias), self.replay_fold)
        gate_user = gate_input(user.early, user.logits, local_user)
        gate_replay = gate_input(self.replay.early, self.replay.logits, local_replay)
        weight, offset = self.fit_gate(gate_user, fold, gate_replay)
        threshold = choose_threshold(
            unseen(gate_user @ weight + offset, fold)[:, 0],
            gain(local_user, user.logits, labels),
            unseen(gate_replay @ weight + offset, self.replay_fold)[:, 0],
            expected_gain(local_replay, self.replay.logits, self.replay_labels),
            self.recipe,
        )
        return Learned(down[-1], up[-1], bias[-1, 0], weight[-1, :, 0], offset[-1, 0, 0], torch.tensor(threshold))

    def fit_expert(self, copies: list[Features], labels: Tensor, fold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Stacked `down (K+1, width, rank)`, `up (K+1, rank, C)`, `bias (K+1, 1, C)`."""
        recipe, random, models = self.recipe, self.random, len(self.stack)
        mean, std = self.replay.hidden.mean(0), self.replay.hidden.std(0) + 1e-2
        hidden = (torch.stack([features.hidden for features in copies], 1) - mean) / std
        logits = torch.stack([features.logits for features in copies], 1)
        replay_hidden, replay_probs = (self.replay.hidden - mean) / std, self.replay.logits.softmax(1)
        width, rank, classes = hidden.shape[-1], self.backend.rank, logits.shape[-1]
        down = (torch.randn(1, width, rank, generator=random) / math.sqrt(width)).repeat(models, 1, 1)
        start = [down, torch.zeros(models, rank, classes), torch.zeros(models, 1, classes)]
        size = recipe.expert_batch

        def draw() -> Batch:
            i = torch.randint(len(labels), (size,), generator=random)
            version = torch.randint(len(copies), (size,), generator=random)
            j = torch.randint(len(replay_hidden), (size,), generator=random)
            both = torch.cat([hidden[i, version], replay_hidden[j]])
            base = torch.cat([logits[i, version], self.replay.logits[j]])
            seen, replay_seen = fold[i] != self.stack, self.replay_fold[j] != self.stack
            return both, base, labels[i], replay_probs[j], seen, replay_seen

        learner = self.backend.expert_learner(recipe)
        self.sgd("local expert", learner, start, recipe.expert_steps, recipe.expert_rate, draw)
        down, up, bias = learner.parameters()
        # Standardisation moves into the weights: it costs no parameter.
        down = down / std[:, None]
        return down, up, bias - mean[None, None] @ down @ up

    def fit_gate(self, user: Tensor, fold: Tensor, replay: Tensor) -> tuple[Tensor, Tensor]:
        """Stacked `weight (K+1, inputs, 1)` and `offset (K+1, 1, 1)`: the user's samples against the replay buffer."""
        recipe, random, size, models = self.recipe, self.random, self.recipe.gate_batch, len(self.stack)
        mean, std = replay.mean(0), replay.std(0) + 1e-2
        user, replay = (user - mean) / std, (replay - mean) / std

        def draw() -> Batch:
            i = torch.randint(len(user), (size,), generator=random)
            j = torch.randint(len(replay), (size,), generator=random)
            seen = torch.cat([fold[i] != self.stack, self.replay_fold[j] != self.stack], 1)
            return torch.cat([user[i], replay[j]]), seen

        learner = self.backend.gate_learner(recipe)
        start = [torch.zeros(models, user.shape[1], 1), torch.zeros(models, 1, 1)]
        self.sgd("gate", learner, start, recipe.gate_steps, recipe.gate_rate, draw)
        weight, offset = learner.parameters()
        weight = weight / std[:, None]
        return weight, offset - mean[None, None] @ weight

    def sgd(
        self, phase: str, learner: Learner, start: list[Tensor], steps: int, rate: float, draw: Callable[[], Batch]
    ) -> None:
        """Fit the parameters; where that diverges, begin again at a quarter of the rate.

        Features of unusual images can be far larger than those of the replay buffer, too large for the usual rate.
        """
        state = self.random.get_state()
        for attempt in range(ATTEMPTS):
            learner.begin(start)
            if self.descend(phase, learner, steps, rate / 4**attempt, draw):
                return
            self.random.set_state(state)
        raise ValueError(
            f"Learning the {phase} diverged even at {rate / 4 ** (ATTEMPTS - 1):.2g} of a learning rate: these images "
            "are unlike any the model knows. Check that they are white ink on black, upright and centred."
        )

    def descend(self, phase: str, learner: Learner, steps: int, rate: float, draw: Callable[[], Batch]) -> bool:
        """SGD with thirty steps of warm-up, then a cosine to zero; whether the loss fell in the end."""
        losses = []
        for step in range(steps):
            warm = min(1.0, (step + 1) / 30)
            now = rate * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
            losses.append(learner.step(draw(), now))
            self.progress(phase, step + 1, steps)
        # A comparison with a loss that is not a number is false too.
        return sum(losses[-20:]) / len(losses[-20:]) <= losses[0]


def expert_loss(parameters: Sequence[Tensor], batch: Batch, replay_weight: float) -> Tensor:
    """Cross-entropy of stacked local experts on S samples, plus distillation on as many of the replay buffer.

    Args:
        parameters: `down (K+1, width, rank)`, `up (K+1, rank, C)`, `bias (K+1, 1, C)`.
        batch: Hidden features `(2 S, width)` and the global expert's logits `(2 S, C)`, the samples' first; labels
            `(S,)`; the global expert's probabilities `(S, C)` of the buffer's; who may see which, `(K+1, S)` twice.
        replay_weight: Of the distillation.

    Returns:
        A scalar, summed over the stack.
    """
    down, up, bias = parameters
    both, base, labels, replay_probs, seen, replay_seen = batch
    size = len(labels)
    log_probs = (base + both @ down @ up + bias).log_softmax(-1)
    right = log_probs[:, :size].gather(-1, labels.expand(len(down), -1)[..., None])[..., 0]
    distilled = (log_probs[:, size:] * replay_probs).sum(-1)
    return -(right * seen + replay_weight * distilled * replay_seen).sum() / size


def gate_loss(parameters: Sequence[Tensor], batch: Batch) -> Tensor:
    """Cross-entropy of stacked gates that tell S of the user's samples from as many of the buffer.

    Args:
        parameters: `weight (K+1, inputs, 1)` and `offset (K+1, 1, 1)`.
        batch: What the gate reads, `(2 S, inputs)`, the user's first, and who may see which, `(K+1, 2 S)`.

    Returns:
        A scalar, summed over the stack.
    """
    weight, offset = parameters
    both, seen = batch
    size = len(both) // 2
    score = (both @ weight + offset)[..., 0]
    target = torch.cat([torch.ones(size), torch.zeros(size)]).expand(len(weight), -1)
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(score, target, reduction="none")
    return (entropy * seen).sum() / size


class TorchBackend:
    """The networks of a model, and autograd."""

    def __init__(self, model: CustomizedLeNet) -> None:
        """Wrap a model in eval mode with a filled replay buffer."""
        self.model = model
        self.num_classes = model.num_classes
        self.rank = model.rank
        self.features = model.features
        self.replay = model.replay

    def warp(self, images: Tensor, maps: Tensor) -> Tensor:
        """As `Backend.warp`."""
        return warp(images, maps)

    def expert_learner(self, recipe: Recipe) -> "TorchLearner":
        """As `Backend.expert_learner`."""
        return TorchLearner(partial(expert_loss, replay_weight=recipe.replay_weight), recipe)

    def gate_learner(self, recipe: Recipe) -> "TorchLearner":
        """As `Backend.gate_learner`."""
        return TorchLearner(gate_loss, recipe)


class TorchLearner:
    """`torch.optim.SGD` on a loss that autograd differentiates."""

    def __init__(self, loss: Loss, recipe: Recipe) -> None:
        """Keep the loss; the recipe says how much weights decay."""
        self.loss = loss
        self.weight_decay = recipe.weight_decay

    def begin(self, start: Sequence[Tensor]) -> None:
        """As `Learner.begin`."""
        self.values = [value.clone().requires_grad_() for value in start]
        self.optimizer = torch.optim.SGD(self.values, lr=0.0, momentum=MOMENTUM, weight_decay=self.weight_decay)

    def step(self, batch: Batch, rate: float) -> float:
        """As `Learner.step`."""
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.zero_grad()
        with torch.enable_grad():
            loss = self.loss(self.values, batch)
            loss.backward()
        self.optimizer.step()
        return loss.item()

    def parameters(self) -> list[Tensor]:
        """As `Learner.parameters`."""
        return [value.detach() for value in self.values]


def correct(features: Features, down: Tensor, up: Tensor, bias: Tensor) -> Tensor:
    """The local experts' logits of a stack of models, `(K+1, N, C)`."""
    return features.logits + features.hidden @ down @ up + bias


def unseen(stacked: Tensor, fold: Tensor) -> Tensor:
    """From the predictions `(K+1, N, ...)` of all models, those `(N, ...)` of the model that left the sample out."""
    return stacked[fold, torch.arange(len(fold))]


def gain(local: Tensor, base: Tensor, labels: Tensor) -> Tensor:
    """+1 where the local expert repairs an error, -1 where it makes one, `(N,)`."""
    return (local.argmax(1) == labels).float() - (base.argmax(1) == labels).float()


def expected_gain(local: Tensor, base: Tensor, labels: Tensor) -> Tensor:
    """What the local expert adds to the probability of the right class, `(N,)`: `gain` with less noise."""
    return (local.softmax(1) - base.softmax(1)).gather(1, labels[:, None])[:, 0]


def choose_threshold(
    user_score: Tensor, user_gain: Tensor, replay_score: Tensor, replay_gain: Tensor, recipe: Recipe
) -> float:
    """The lowest threshold that costs generic images no more than allowed; 1 (closed) unless it clearly helps the user.

    Args:
        user_score: `(N,)` gate logits of the user's samples.
        user_gain: `(N,)` from `gain`.
        replay_score: `(n,)` gate logits of the replay buffer.
        replay_gain: `(n,)` from `expected_gain`.
        recipe: Says what is allowed and what is clear.

    Returns:
        A probability.
    """
    score, order = replay_score.sort(descending=True)
    drop = -100 * replay_gain[order].cumsum(0) / len(score)
    too_much = (drop > recipe.max_drop).nonzero()
    cheap = int(too_much[0, 0]) if len(too_much) else len(score) - 1
    threshold = score[min(cheap, int(recipe.max_route * len(score)))]
    changed = user_gain[user_score > threshold]
    repaired, broken = int((changed > 0).sum()), int((changed < 0).sum())
    if repaired - broken <= recipe.confidence * math.sqrt(repaired + broken):
        return 1.0
    return float(torch.sigmoid(threshold))


def deal_folds(labels: Tensor, folds: int, random: torch.Generator) -> Tensor:
    """Folds of equal size `(N,)`, each class dealt out in turn; works for classes of one sample."""
    order = torch.randperm(len(labels), generator=random)
    order = order[torch.argsort(labels[order], stable=True)]
    fold = torch.empty(len(labels), dtype=torch.long)
    fold[order] = torch.arange(len(labels)) % folds
    return fold


def augment(images: Tensor, random: torch.Generator) -> Tensor:
    """Rotate up to 10 degrees, shear up to 0.15, scale up to 10 %, shift up to 1.5 pixels: `(N, 1, 28, 28)`."""
    return warp(images, draw_maps(len(images), random))


def draw_maps(count: int, random: torch.Generator) -> Tensor:
    """The affine maps of `augment`, `(count, 2, 3)`, from new coordinates to old ones."""

    def uniform(limit: float) -> Tensor:
        return (torch.rand(count, generator=random) * 2 - 1) * limit

    angle, shear = uniform(math.radians(10)), uniform(0.15)
    wide, high = 1 + uniform(0.1), 1 + uniform(0.1)
    cos, sin = angle.cos(), angle.sin()
    first = torch.stack([cos * wide, (shear - sin) * high, uniform(1.5 / 14)], 1)
    second = torch.stack([sin * wide, cos * high, uniform(1.5 / 14)], 1)
    return torch.stack([first, second], 1)


def warp(images: Tensor, maps: Tensor) -> Tensor:
    """Draw images `(N, 1, 28, 28)` anew under affine maps `(N, 2, 3)` from new to old coordinates."""
    grid = torch.nn.functional.affine_grid(maps, list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images, grid, align_corners=False)
