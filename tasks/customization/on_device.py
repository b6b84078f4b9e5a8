"""Learning a hand on a device: ExecuTorch's runtime alone runs the networks, gives gradients and takes the steps.

    moe-zoo export customization/lenet5-emnist --format executorch --trainable --output lenet5.pte
    python -m tasks.customization.on_device --program lenet5.pte --samples DIR

DIR holds class folders (`digit_0/*.png`, `upper_A`, `lower_a`); a fifth of the samples is held back to show what was
learned. Neither autograd nor a module of torch.nn takes part, nor could it: everything runs in inference mode, on the
tensors of the runtime's Python binding. Folds, batches, schedule, stopping rule and threshold are `customizer.learn`.
"""

import argparse
import importlib.util
import time
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tasks.customization.characters import merge
from tasks.customization.customizer import Batch, Learned, Progress, Recipe, learn, one_thread
from tasks.customization.data import UserDataModule, UserSamples, read_class_folders, split_user, to_float
from tasks.customization.model import Features
from zoo.errors import DataNotFoundError
from zoo.export import INSTALL, MAX_BATCH, training_path
from zoo.report import print_table


def customize_on_device(
    backend: "DeviceBackend",
    images: Tensor,
    labels: Tensor,
    *,
    seed: int = 0,
    recipe: Recipe | None = None,
    progress: Progress | None = None,
) -> Learned:
    """As `customizer.customize`, by the runtime alone: what was learned, to be given to `DeviceBackend.classify`."""
    with one_thread(), torch.inference_mode():
        return learn(backend, images, labels, seed=seed, recipe=recipe, progress=progress)


class DeviceBackend:
    """Both programs of `moe-zoo export --trainable` in ExecuTorch's runtime."""

    def __init__(self, program: str | Path, training: str | Path | None = None) -> None:
        """Load them.

        Args:
            program: The inference program.
            training: The training program; by default the one that was written beside it.

        Raises:
            ValueError: ExecuTorch is not installed, or the files are no such programs.
            DataNotFoundError: A file is missing.
        """
        if importlib.util.find_spec("executorch") is None:
            raise ValueError(f"Running a program needs executorch, not installed here: {INSTALL}.")
        self.program = load(Path(program), {"forward", "features"})
        self.training = load(Path(training or training_path(Path(program))), {"expert", "gate", "warp", "replay"})
        self.num_classes = int(self.constant("num_classes"))
        self.rank = int(self.constant("rank"))

    def constant(self, name: str) -> float:
        """A number that the training program was built for."""
        value: float = self.training.run_method(name, ())[0]
        return value

    def features(self, images: Tensor) -> Features:
        """As `Backend.features`."""
        return Features(*run_in_chunks(self.program, "features", images))

    def warp(self, images: Tensor, maps: Tensor) -> Tensor:
        """As `Backend.warp`."""
        (drawn,) = run_in_chunks(self.training, "warp", images, maps)
        return drawn

    def replay(self) -> tuple[Features, Tensor]:
        """As `Backend.replay`."""
        early, hidden, logits, labels = self.training.run_method("replay", ())
        return Features(early, hidden, logits), labels

    def expert_learner(self, recipe: Recipe) -> "DeviceLearner":
        """As `Backend.expert_learner`."""
        return self.learner("expert", recipe)

    def gate_learner(self, recipe: Recipe) -> "DeviceLearner":
        """As `Backend.gate_learner`."""
        return self.learner("gate", recipe)

    def learner(self, method: str, recipe: Recipe) -> "DeviceLearner":
        """A learner of one of the losses.

        Raises:
            ValueError: The recipe differs from what the program was built for.
        """
        for name in {field.name for field in fields(Recipe)} & set(self.training.method_names()):
            built, asked = self.constant(name), getattr(recipe, name)
            if built != asked:
                raise ValueError(f"The recipe has {name}={asked}, the training program was exported for {built:g}.")
        return DeviceLearner(self.training, method)

    @torch.inference_mode()
    def classify(self, images: Tensor, learned: Learned) -> tuple[Tensor, Tensor]:
        """Logits `(N, C)` of images `(N, 1, 28, 28)`, and who answered `(N,)`: 1 is the local expert."""
        values = [getattr(learned, field.name).contiguous() for field in fields(Learned)]
        logits, expert = run_in_chunks(self.program, "forward", images, constants=values)
        return logits, expert


class DeviceLearner:
    """The runtime's SGD on the gradients of a training program.

    Its Python binding offers no change of the learning rate, so each step has an optimiser of its own; momentum and
    weight decay are in the gradients already (`programs.Step`).
    """

    def __init__(self, module: Any, method: str) -> None:
        """Wrap one method of a loaded training program."""
        from executorch.extension.training import TrainingModule

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the interface is experimental
            self.program = TrainingModule(module)
        self.method = method

    def begin(self, start: Sequence[Tensor]) -> None:
        """As `Learner.begin`."""
        self.start: Sequence[Tensor] = start
        self.velocity = [torch.zeros_like(value) for value in start]
        self.values: dict[str, Tensor] = {}

    def step(self, batch: Batch, rate: float) -> float:
        """As `Learner.step`."""
        if not self.values:
            # The runtime shows its parameters after a first run only.
            self.run(batch)
            self.values = self.program.named_parameters()
            for value, start in zip(self.values.values(), self.start, strict=True):
                value.copy_(start)
        loss = self.run(batch)
        gradients = self.program.named_gradients()
        new_sgd(self.values, rate).step(gradients)
        self.velocity = list(gradients.values())
        return loss

    def run(self, batch: Batch) -> float:
        """One forward and backward; the loss."""
        _, loss = self.program.forward_backward(self.method, [*batch, *self.velocity])
        return float(loss)

    def parameters(self) -> list[Tensor]:
        """As `Learner.parameters`."""
        return [value.clone() for value in self.values.values()]


def new_sgd(values: dict[str, Tensor], rate: float) -> Any:
    """The runtime's SGD without momentum."""
    from executorch.extension.training import get_sgd_optimizer

    return get_sgd_optimizer(values, rate)


def load(path: Path, methods: set[str]) -> Any:
    """Load a program that must have these methods.

    Raises:
        DataNotFoundError: There is no such file.
        ValueError: It is no program, or another.
    """
    from executorch.extension.pybindings import portable_lib

    if not path.is_file():
        raise DataNotFoundError(
            "the program",
            [path],
            "Write it: moe-zoo export customization/lenet5-emnist --format executorch --trainable --output FILE.",
        )
    try:
        module = portable_lib._load_for_executorch(str(path))
        # The file is read no earlier than here.
        names = set(module.method_names())
    except RuntimeError as error:
        raise ValueError(f"{path} is no program of this ExecuTorch ({error}): export it again.") from None
    missing = methods - names
    if missing:
        raise ValueError(
            f"{path} has no method {', '.join(sorted(missing))}: it takes a program exported with --trainable."
        )
    return module


def run_in_chunks(module: Any, method: str, *rows: Tensor, constants: Sequence[Tensor] = ()) -> list[Tensor]:
    """Run a method on as many rows at a time as it takes, and join each output."""
    chunks = zip(*(tensor.split(MAX_BATCH) for tensor in rows), strict=True)
    outputs = [module.run_method(method, [*(part.contiguous() for part in chunk), *constants]) for chunk in chunks]
    return [torch.cat(parts) for parts in zip(*outputs, strict=True)]


def main(args: Sequence[str] | None = None) -> None:
    """Customise for one user and show what held-back samples gain.

    Args:
        args: Command line; that of the process by default.
    """
    parser = argparse.ArgumentParser("python -m tasks.customization.on_device", description="Learn a hand on a device.")
    parser.add_argument("--program", required=True, type=Path, help="inference program of moe-zoo export --trainable")
    parser.add_argument("--training", type=Path, help="training program; by default the one beside it")
    whose = parser.add_mutually_exclusive_group(required=True)
    whose.add_argument("--samples", type=Path, help="class folders: digit_0/*.png, upper_A, lower_a")
    whose.add_argument("--user", help="a writer of unipen.npz, or synthetic-N, instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="safetensors file to write what was learned to")
    options = parser.parse_args(args)
    backend = DeviceBackend(options.program, options.training)
    user = samples_of(options.samples, options.user, options.seed)
    images, labels = to_learn_from(user)
    start = time.perf_counter()
    learned = customize_on_device(backend, images, labels, seed=user.seed)
    seconds = time.perf_counter() - start
    print_table(f"{user.user}: accuracy on samples that were held back", [score(backend, learned, user, seconds)])
    if learned.threshold >= 1:
        print("By your own samples the local expert does not help clearly enough: the gate stays closed.")
    if options.output:
        from safetensors.torch import save_file

        save_file({field.name: getattr(learned, field.name).contiguous() for field in fields(Learned)}, options.output)
        print(f"What was learned: {options.output}")


def samples_of(folder: Path | None, user: str | None, seed: int) -> UserSamples:
    """The samples of class folders, or of a known writer, split as everywhere."""
    if folder:
        return split_user(folder.name, read_class_folders(folder), seed)
    synthetic = bool(user) and str(user).startswith("synthetic-")
    module = UserDataModule(source="synthetic" if synthetic else "unipen", user=user, generic="none", seeds=[seed])
    module.setup()
    return module.users[0]


def to_learn_from(user: UserSamples) -> tuple[Tensor, Tensor]:
    """Images `(N, 1, 28, 28)` and merged labels of a user's training and validation parts."""
    images = torch.cat([user.train.images, user.val.images])
    return to_float(images), merge(torch.cat([user.train.labels, user.val.labels]))


def score(backend: DeviceBackend, learned: Learned, user: UserSamples, seconds: float) -> dict[str, Any]:
    """What a user's test part says."""
    images, labels = to_float(user.test.images), merge(user.test.labels)
    with torch.inference_mode():
        before = backend.features(images).logits
    after, expert = backend.classify(images, learned)
    return {
        "learned from": len(user.train) + len(user.val),
        "held back": len(labels),
        "before (%)": 100 * (before.argmax(1) == labels).float().mean().item(),
        "after (%)": 100 * (after.argmax(1) == labels).float().mean().item(),
        "asked the local expert (%)": 100 * (expert == 1).float().mean().item(),
        "seconds": seconds,
    }


if __name__ == "__main__":
    main()
