"""Learning one user's handwriting on the user's own device: the local expert, the gate, and its threshold.

Both are fitted by plain SGD with momentum on cached features of the frozen global expert. K models that each leave a
fold of the samples out, and the final one that leaves out none, are fitted side by side as one stacked tensor: what
the gate learns from and what the threshold is chosen on are then predictions for samples that a model has not seen,
so that every sample serves for training and for validation.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from tasks.customization.model import CustomizedLeNet, Features, gate_input

# Learning rates tried, each a quarter of the last.
ATTEMPTS = 4

Progress = Callable[[str, int, int], None]


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
    recipe = recipe or Recipe()
    check_samples(model, images, labels, recipe)
    with one_thread(), torch.inference_mode(False), torch.enable_grad():
        return _Customization(model, recipe, seed, progress or (lambda phase, step, steps: None)).run(images, labels)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: on matrices this small several threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check_samples(model: CustomizedLeNet, images: Tensor, labels: Tensor, recipe: Recipe) -> None:
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
    """One run of `customize`: its random generator, its replay buffer and its folds."""

    def __init__(self, model: CustomizedLeNet, recipe: Recipe, seed: int, progress: Progress) -> None:
        self.model = copy.deepcopy(model).eval()
        self.recipe = recipe
        self.random = torch.Generator().manual_seed(seed)
        self.progress = progress
        # Model k leaves fold k out; the last one leaves out nothing.
        self.stack = torch.arange(recipe.folds + 1)[:, None]
        with torch.no_grad():
            self.replay, self.replay_labels = self.model.replay()
        self.replay_fold = torch.randperm(len(self.replay_labels), generator=self.random) % recipe.folds

    def run(self, images: Tensor, labels: Tensor) -> CustomizedLeNet:
        with torch.no_grad():
            copies = [self.model.features(images)]
            copies += [self.model.features(augment(images, self.random)) for _ in range(self.recipe.copies)]
        user = copies[0]
        fold = deal_folds(labels, self.recipe.folds, self.random)
        down, up, bias = self.fit_expert(copies, labels, fold)
        with torch.no_grad():
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
        self.keep(down[-1], up[-1], bias[-1, 0], weight[-1, :, 0], offset[-1, 0], threshold)
        return self.model

    def fit_expert(self, copies: list[Features], labels: Tensor, fold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Stacked `down (K+1, width, rank)`, `up (K+1, rank, C)`, `bias (K+1, 1, C)`."""
        recipe, random, models = self.recipe, self.random, len(self.stack)
        mean, std = self.replay.hidden.mean(0), self.replay.hidden.std(0) + 1e-2
        hidden = (torch.stack([features.hidden for features in copies], 1) - mean) / std
        logits = torch.stack([features.logits for features in copies], 1)
        replay_hidden, replay_probs = (self.replay.hidden - mean) / std, self.replay.logits.softmax(1)
        width, rank, classes = hidden.shape[-1], self.model.rank, logits.shape[-1]
        start = torch.randn(1, width, rank, generator=random) / math.sqrt(width)
        down = start.repeat(models, 1, 1).requires_grad_()
        up = torch.zeros(models, rank, classes, requires_grad=True)
        bias = torch.zeros(models, 1, classes, requires_grad=True)
        size = recipe.expert_batch

        def loss() -> Tensor:
            i = torch.randint(len(labels), (size,), generator=random)
            version = torch.randint(len(copies), (size,), generator=random)
            j = torch.randint(len(replay_hidden), (size,), generator=random)
            both = torch.cat([hidden[i, version], replay_hidden[j]])
            base = torch.cat([logits[i, version], self.replay.logits[j]])
            log_probs = (base + both @ down @ up + bias).log_softmax(-1)
            right = log_probs[:, :size].gather(-1, labels[i].expand(models, -1)[..., None])[..., 0]
            distilled = (log_probs[:, size:] * replay_probs[j]).sum(-1)
            seen, replay_seen = fold[i] != self.stack, self.replay_fold[j] != self.stack
            return -(right * seen + recipe.replay_weight * distilled * replay_seen).sum() / size

        self.sgd("local expert", [down, up, bias], recipe.expert_steps, recipe.expert_rate, loss)
        with torch.no_grad():
            # Standardisation moves into the weights: it costs no parameter.
            down /= std[:, None]
            bias -= mean[None, None] @ down @ up
        return down.detach(), up.detach(), bias.detach()

    def fit_gate(self, user: Tensor, fold: Tensor, replay: Tensor) -> tuple[Tensor, Tensor]:
        """Stacked `weight (K+1, inputs, 1)` and `offset (K+1, 1, 1)`: the user's samples against the replay buffer."""
        recipe, random, size = self.recipe, self.random, self.recipe.gate_batch
        mean, std = replay.mean(0), replay.std(0) + 1e-2
        user, replay = (user - mean) / std, (replay - mean) / std
        weight = torch.zeros(len(self.stack), user.shape[1], 1, requires_grad=True)
        offset = torch.zeros(len(self.stack), 1, 1, requires_grad=True)
        target = torch.cat([torch.ones(size), torch.zeros(size)]).expand(len(self.stack), -1)

        def loss() -> Tensor:
            i = torch.randint(len(user), (size,), generator=random)
            j = torch.randint(len(replay), (size,), generator=random)
            score = (torch.cat([user[i], replay[j]]) @ weight + offset)[..., 0]
            seen = torch.cat([fold[i] != self.stack, self.replay_fold[j] != self.stack], 1)
            entropy = torch.nn.functional.binary_cross_entropy_with_logits(score, target, reduction="none")
            return (entropy * seen).sum() / size

        self.sgd("gate", [weight, offset], recipe.gate_steps, recipe.gate_rate, loss)
        with torch.no_grad():
            weight /= std[:, None]
            offset -= mean[None, None] @ weight
        return weight.detach(), offset.detach()

    def sgd(self, phase: str, parameters: list[Tensor], steps: int, rate: float, loss: Callable[[], Tensor]) -> None:
        """Fit the parameters; where that diverges, begin again at a quarter of the rate.

        Features of unusual images can be far larger than those of the replay buffer, too large for the usual rate.
        """
        start, state = [parameter.detach().clone() for parameter in parameters], self.random.get_state()
        for attempt in range(ATTEMPTS):
            if self.descend(phase, parameters, steps, rate / 4**attempt, loss):
                return
            self.random.set_state(state)
            with torch.no_grad():
                for parameter, value in zip(parameters, start, strict=True):
                    parameter.copy_(value)
        raise ValueError(
            f"Learning the {phase} diverged even at {rate / 4 ** (ATTEMPTS - 1):.2g} of a learning rate: these images "
            "are unlike any the model knows. Check that they are white ink on black, upright and centred."
        )

    def descend(
        self, phase: str, parameters: list[Tensor], steps: int, rate: float, loss: Callable[[], Tensor]
    ) -> bool:
        """SGD with momentum 0.9, thirty steps of warm-up, then a cosine to zero; whether the loss fell in the end."""
        losses = []
        optimizer = torch.optim.SGD(parameters, lr=rate, momentum=0.9, weight_decay=self.recipe.weight_decay)
        for step in range(steps):
            warm = min(1.0, (step + 1) / 30)
            optimizer.param_groups[0]["lr"] = rate * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            value = loss()
            value.backward()
            optimizer.step()
            losses.append(value.item())
            self.progress(phase, step + 1, steps)
        # A comparison with a loss that is not a number is false too.
        return sum(losses[-20:]) / len(losses[-20:]) <= losses[0]

    @torch.no_grad()
    def keep(self, down: Tensor, up: Tensor, bias: Tensor, weight: Tensor, offset: Tensor, threshold: float) -> None:
        """Write what was learned into the model."""
        expert, gate = self.model.local_expert, self.model.gate.linear
        expert.down.copy_(down)
        expert.up.copy_(up)
        expert.bias.copy_(bias)
        gate.weight.copy_(weight[None])
        gate.bias.copy_(offset)
        self.model.threshold.fill_(threshold)


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

    def uniform(limit: float) -> Tensor:
        return (torch.rand(len(images), generator=random) * 2 - 1) * limit

    angle, shear = uniform(math.radians(10)), uniform(0.15)
    wide, high = 1 + uniform(0.1), 1 + uniform(0.1)
    cos, sin = angle.cos(), angle.sin()
    first = torch.stack([cos * wide, (shear - sin) * high, uniform(1.5 / 14)], 1)
    second = torch.stack([sin * wide, cos * high, uniform(1.5 / 14)], 1)
    grid = torch.nn.functional.affine_grid(torch.stack([first, second], 1), list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images, grid, align_corners=False)
