"""What `moe-zoo export` makes of a model that is to learn on a device: the entry points of two programs.

The inference program takes what was learned as inputs, so that one file serves everybody. The training program holds
the two losses with their gradients, the replay buffer and the augmentation; `on_device` drives both.
"""

import copy
import os
from collections.abc import Sequence
from dataclasses import fields
from functools import partial

import torch
from torch import Tensor, nn
from torch.export import Dim

from tasks.customization.customizer import MOMENTUM, Batch, Learned, Loss, Recipe, expert_loss, gate_loss, warp
from tasks.customization.data import CharacterDataModule, to_float
from tasks.customization.evaluate import accuracy
from tasks.customization.model import ConfidenceGate, CustomizedLeNet, Features, num_early_features
from zoo.data import ENVIRONMENT_VARIABLE
from zoo.export import MAX_BATCH, DevicePrograms, Method, ReferenceData

# What in the model each field of `Learned` is, and its shape there.
STATE = {
    "down": "mixture.experts.experts.1.down",
    "up": "mixture.experts.experts.1.up",
    "bias": "mixture.experts.experts.1.bias",
    "weight": "mixture.router.gate.linear.weight",
    "offset": "mixture.router.gate.linear.bias",
    "threshold": "mixture.router.threshold",
}


def device_programs(model: CustomizedLeNet) -> DevicePrograms:
    """All entry points, for the recipe's default sizes.

    Args:
        model: Fresh or customised, with a filled replay buffer.
    """
    recipe = Recipe()
    bare = without_replay(model)
    images, batch = torch.rand(MAX_BATCH, 1, 28, 28), {0: Dim("batch", min=1, max=MAX_BATCH)}
    maps = torch.eye(2, 3).expand(MAX_BATCH, 2, 3) + 0.1 * torch.rand(MAX_BATCH, 2, 3)
    inference = {
        "forward": Method(Classify(bare), (images, *state_of(model)), (batch, *(None for _ in STATE))),
        "features": Method(Extract(bare), (images,), (batch,)),
    }
    training = {
        "expert": expert_method(model, recipe),
        "gate": gate_method(model, recipe),
        "warp": Method(Warp(), (images, maps), (batch, batch)),
        "replay": Method(Replay(model)),
    }
    constants: dict[str, int | float] = {name: getattr(recipe, name) for name in BUILT_IN}
    return DevicePrograms(inference, training, constants | {"rank": model.rank, "num_classes": model.num_classes})


# Fields of `Recipe` that the training program is built for.
BUILT_IN = ("folds", "expert_batch", "gate_batch", "weight_decay", "replay_weight")


def reference_data() -> ReferenceData:
    """Generic handwriting: EMNIST where the data folder is known, else stroke fonts."""
    real = bool(os.environ.get(ENVIRONMENT_VARIABLE))
    module = CharacterDataModule() if real else CharacterDataModule(source="generated", writers=5, samples_per_class=2)
    module.setup()
    train, test = module.train_set.samples, module.test_set.samples
    random = torch.Generator().manual_seed(0)
    seen = train[torch.randperm(len(train), generator=random)[:512]]
    scored = test[torch.randperm(len(test), generator=random)[:8192]]
    return ReferenceData(
        "images of EMNIST's test part" if real else "characters in stroke fonts (synthetic)",
        (to_float(seen.images),),
        (to_float(scored.images),),
        "accuracy",
        lambda logits: accuracy(logits, scored.labels[: len(logits)]),
    )


def without_replay(model: CustomizedLeNet) -> CustomizedLeNet:
    """A copy whose replay buffer is empty: inference needs none."""
    bare = copy.deepcopy(model).eval()
    for name in ("replay_early", "replay_hidden", "replay_labels"):
        setattr(bare, name, getattr(bare, name)[:0])
    return bare


def state_of(model: CustomizedLeNet) -> tuple[Tensor, ...]:
    """What a model has learned, in the order and the shapes of `Learned`."""
    state = model.state_dict()
    values = {name: state[key] for name, key in STATE.items()}
    values |= {"weight": values["weight"][0], "offset": values["offset"][0]}
    return tuple(values[field.name] for field in fields(Learned))


class Classify(nn.Module):
    """Images and what was learned to logits `(N, C)` and who answered `(N,)`, 1 being the local expert."""

    def __init__(self, model: CustomizedLeNet) -> None:
        """Wrap a model."""
        super().__init__()
        self.model = model

    def forward(
        self, images: Tensor, down: Tensor, up: Tensor, bias: Tensor, weight: Tensor, offset: Tensor, threshold: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Classify `(N, 1, 28, 28)`; the rest is what `Learned` holds."""
        state = dict(zip(STATE.values(), (down, up, bias, weight[None], offset[None], threshold), strict=True))
        logits, routing = torch.func.functional_call(self.model, state, (images,), {"return_routing": True})
        return logits, routing.expert_index[:, 0]


class Extract(nn.Module):
    """Images to what local expert and gate read of them."""

    def __init__(self, model: CustomizedLeNet) -> None:
        """Wrap a model."""
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map `(N, 1, 28, 28)` to the three parts of `Features`."""
        return parts(self.model.features(images))


class Replay(nn.Module):
    """The replay buffer."""

    def __init__(self, model: CustomizedLeNet) -> None:
        """Wrap a model."""
        super().__init__()
        self.model = model

    def forward(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The three parts of its `Features`, and labels."""
        features, labels = self.model.replay()
        return *parts(features), labels


class Warp(nn.Module):
    """Augmentation by given maps."""

    def forward(self, images: Tensor, maps: Tensor) -> Tensor:
        """As `customizer.warp`."""
        return warp(images, maps)


class Step(nn.Module):
    """A loss whose gradient is what SGD with momentum and weight decay subtracts.

    The runtime's SGD cannot change its learning rate between steps, and an optimiser made anew for each step has no
    momentum. So the velocity comes in. With the loss L of parameters p, weight decay w, momentum m and velocity v so
    far, the gradient of `L + w / 2 |p|^2 + m <v, p>` is `dL/dp + w p + m v`, the next velocity of `torch.optim.SGD`.
    """

    def __init__(self, loss: Loss, shapes: Sequence[tuple[int, ...]], weight_decay: float) -> None:
        """Make parameters of these shapes, with small random values until the first start is set.

        Args:
            loss: Of the parameters and a batch.
            shapes: Of the parameters.
            weight_decay: Of all.
        """
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.values = nn.ParameterList(0.1 * torch.randn(shape, generator=random) for shape in shapes)
        self.loss = loss
        self.weight_decay = weight_decay

    def forward(self, batch: Batch, velocity: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """What is differentiated, and the loss alone."""
        values = list(self.values)
        loss = total = self.loss(values, batch)
        for value, speed in zip(values, velocity, strict=True):
            total = total + self.weight_decay / 2 * (value * value).sum() + MOMENTUM * (speed * value).sum()
        return total, loss.detach()


def expert_method(model: CustomizedLeNet, recipe: Recipe) -> Method:
    """Learning of the stacked local experts."""
    size, models, rank, classes = recipe.expert_batch, recipe.folds + 1, model.rank, model.num_classes
    features, labels = model.replay()
    width = features.hidden.shape[1]
    row = torch.arange(2 * size) % len(labels)
    seen = torch.arange(models)[:, None] != torch.arange(size) % models
    with torch.no_grad():
        batch = (
            features.hidden[row] / features.hidden.std(),
            features.logits[row],
            labels[row[:size]],
            features.logits[row[size:]].softmax(1),
            seen,
            seen.flip(0),
        )
    shapes = [(models, width, rank), (models, rank, classes), (models, 1, classes)]
    return learning(partial(expert_loss, replay_weight=recipe.replay_weight), shapes, batch, recipe)


def gate_method(model: CustomizedLeNet, recipe: Recipe) -> Method:
    """Learning of the stacked gates."""
    size, models = recipe.gate_batch, recipe.folds + 1
    inputs = num_early_features(model.variant, model.grey_levels) + ConfidenceGate.NUM_CONFIDENCES
    seen = torch.arange(models)[:, None] != torch.arange(2 * size) % models
    batch = (torch.randn(2 * size, inputs, generator=torch.Generator().manual_seed(0)), seen)
    return learning(gate_loss, [(models, inputs, 1), (models, 1, 1)], batch, recipe)


def learning(loss: Loss, shapes: Sequence[tuple[int, ...]], batch: Batch, recipe: Recipe) -> Method:
    """A method that learns, with an example of each input."""
    step = Step(loss, shapes, recipe.weight_decay)
    random = torch.Generator().manual_seed(1)
    velocity = tuple(torch.randn(shape, generator=random) for shape in shapes)
    return Method(step, (batch, velocity), learns=True)


def parts(features: Features) -> tuple[Tensor, Tensor, Tensor]:
    """`Features` as a tuple."""
    return features.early, features.hidden, features.logits
