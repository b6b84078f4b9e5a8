"""Lightning tasks of customization: training a global expert, and customising it for users."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pytorch_lightning.accelerators import CPUAccelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from tasks.customization.characters import CHARACTERS, MERGED_CHARACTERS, merge
from tasks.customization.customizer import Recipe, customize
from tasks.customization.data import CharacterDataModule, Samples, UserSamples, WholeUser, to_float
from tasks.customization.evaluate import accuracy, both_experts, plot_repairs, plot_users, score_user, summarize
from tasks.customization.model import CustomizedLeNet, Features, LeNet
from zoo import hub
from zoo.errors import UnknownNameError
from zoo.moe.routers.base import require
from zoo.report import print_table, write_metrics, write_predictions
from zoo.task import MoETask, StepOutput


class GlobalExpertTask(MoETask):
    """Train a LeNet on generic handwriting; afterwards it is never changed again."""

    monitor = "val_accuracy"

    def __init__(
        self,
        variant: Literal["lenet5", "lenet-large"] = "lenet5",
        num_classes: int = 47,
        lr: float = 4e-3,
        weight_decay: float = 1e-2,
        warmup: float = 0.25,
    ) -> None:
        """Build network, loss and metrics.

        Args:
            variant: Of `LeNet`.
            num_classes: Width of its output: the first so many of the 47 merged classes.
            lr: Peak learning rate of AdamW.
            weight_decay: Its weight decay.
            warmup: Share of all steps in which the rate rises.

        Raises:
            ValueError: There are not so many classes.
        """
        allowed = 1 <= num_classes <= len(MERGED_CHARACTERS)
        require(allowed, "num_classes", num_classes, f"must be between 1 and {len(MERGED_CHARACTERS)}")
        self.variant = variant
        self.num_classes = num_classes
        super().__init__(lr, weight_decay, warmup)

    def configure_models(self) -> None:
        """Set the network."""
        self.model = LeNet(self.variant, self.num_classes)

    def configure_losses(self) -> None:
        """Cross-entropy."""
        self.criterion = nn.CrossEntropyLoss()

    def configure_metrics(self) -> MetricCollection:
        """Share of right answers among the merged classes; higher is better."""
        return MetricCollection({"accuracy": MulticlassAccuracy(self.num_classes, average="micro")})

    def step(self, batch: tuple[Tensor, Tensor]) -> StepOutput:
        """Classify a batch of images `(N, 1, 28, 28)`."""
        images, labels = batch
        logits = self(images)
        return StepOutput(self.criterion(logits, labels), logits, labels)

    def on_fit_end(self) -> None:
        """Save what a device needs, the expert and a replay buffer, as a checkpoint in the run folder."""
        if not self.trainer.is_global_zero:
            return
        folder = Path(self.trainer.default_root_dir) / "checkpoint"
        data: CharacterDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        model = CustomizedLeNet(self.variant, self.num_classes)
        model.global_expert.load_state_dict(self.model.state_dict())
        samples = data.train_set.samples
        # A device sees classes as often as the world has them: drawn at random, not balanced.
        chosen = torch.randint(len(samples), (model.replay_size,), generator=torch.Generator().manual_seed(data.seed))
        model.eval().fill_replay(to_float(samples.images[chosen]), samples.labels[chosen])
        card = expert_card(self.variant, self.num_classes, data, self.trainer.current_epoch)
        config = (hub.assets() / "configs/customization/users.yaml").read_text()
        hub.save(model, folder, card=card, golden_input=golden_images(samples.images[:8]), config=config)
        print(f"Checkpoint to customise: {folder}")


PREPROCESSING = {"size": "1 x 28 x 28", "range": "0..1", "ink": "white on black, upright, centred"}

# What the sources of training data are called on a card, what of them was learned from, and their terms.
SOURCES = {
    "npz": (
        "EMNIST",
        "80 % of EMNIST ByClass's official test set (93,083 images) and 99,845 further EMNIST images",
        "EMNIST (NIST SD19): US government work",
    ),
    "torchvision": (
        "EMNIST",
        "nine tenths of the official training part of EMNIST's split {split}",
        "EMNIST (NIST SD19): US government work",
    ),
    "folder": ("your own images", "class folders of the trainer's own", "its trainer's to say"),
    "generated": ("stroke fonts (synthetic)", "characters drawn in stroke fonts (synthetic)", "none"),
}


def expert_card(variant: str, num_classes: int, data: CharacterDataModule, epochs: int) -> hub.Card:
    """What the checkpoint of a trained global expert says about itself."""
    name, learned, terms = SOURCES[data.source]
    warning = (
        " Do not score it on torchvision's ByClass test part: most of that was training data."
        if data.source == "npz"
        else ""
    )
    everything = len(MERGED_CHARACTERS)
    classes = f"{everything}" if num_classes == everything else f"the first {num_classes} of {everything}"
    return hub.Card(
        title=f"{variant} on {name}, to be customised",
        task=f"handwritten character recognition, {classes} merged classes",
        description=(
            "A frozen global expert, a closed gate and a replay buffer of 1,000 generic training images' features. "
            "tasks.customization.customizer.customize learns a local expert and the gate from one user's samples."
            + warning
        ),
        data=f"{learned.format(split=data.split)}, {epochs} epochs.",
        data_terms=terms,
        weights_licence="its trainer's to say",
        preprocessing=PREPROCESSING,
        classes=list(MERGED_CHARACTERS[:num_classes]),
    )


class CustomizationTask(MoETask):
    """Customise a zoo checkpoint for one user (`fit`) or for every user in turn to score it (`test`).

    Accuracies are on the 47 merged classes, in percent.
    """

    model: CustomizedLeNet

    def __init__(
        self,
        pretrained: str = "customization/lenet5-emnist",
        recipe: dict[str, int | float] | None = None,
        save_to: str | None = None,
    ) -> None:
        """Load the checkpoint.

        Args:
            pretrained: Name of a zoo checkpoint, or a folder written by `zoo.save`.
            recipe: Fields of `tasks.customization.customizer.Recipe` that differ from its defaults.
            save_to: Folder that `fit` saves the customised model in; by default `customized/<user>` in the run folder.

        Raises:
            UnknownNameError: The recipe has no such field.
            ValueError: A field has a value that is not allowed.
        """
        self.pretrained = pretrained
        self.save_to = save_to
        known = [field.name for field in fields(Recipe)]
        for name in recipe or {}:
            if name not in known:
                raise UnknownNameError("field of recipe", name, known)
        self.recipe = Recipe(**(recipe or {}))  # type: ignore[arg-type]
        super().__init__()
        self.automatic_optimization = False
        self.generic: list[tuple[Features, Tensor]] = []
        self.rows: list[dict[str, Any]] = []

    def configure_models(self) -> None:
        """Load the checkpoint."""
        # Lightning warns of modules that begin training in eval mode; nothing here depends on the mode.
        self.model = hub.load_as(self.pretrained, CustomizedLeNet).train()

    def setup(self, stage: str) -> None:
        """Refuse what a device's customization cannot run on.

        Raises:
            ValueError: The trainer runs on something else than a CPU, or in several processes.
        """
        if not isinstance(self.trainer.accelerator, CPUAccelerator):
            found = type(self.trainer.accelerator).__name__.removesuffix("Accelerator")
            raise ValueError(
                f"The trainer runs on {found}; customization is for the CPU, where it takes seconds. "
                "Set --trainer.accelerator=cpu."
            )
        self.require_one_process("One user is customised for at a time.")

    def configure_optimizers(self) -> list[Optimizer]:
        """None: `customize` has its own two, so that a device without Lightning learns the same."""
        return []

    def learn(self, user: UserSamples) -> tuple[CustomizedLeNet, float]:
        """Customise for a user's training and validation samples; the model and the seconds it took."""
        images = torch.cat([user.train.images, user.val.images])
        labels = merge(torch.cat([user.train.labels, user.val.labels]))
        start = time.perf_counter()
        model = customize(self.model, to_float(images), labels, seed=user.seed, recipe=self.recipe)
        return model, time.perf_counter() - start

    def training_step(self, batch: UserSamples, batch_idx: int) -> None:
        """Customise for the user, save the result, and show what it changed on held-back samples."""
        customised, seconds = self.learn(batch)
        folder = Path(self.trainer.default_root_dir)
        target = Path(self.save_to) if self.save_to else folder / "customized" / batch.user
        data = {name: getattr(self.trainer.datamodule, name) for name in LEARNED_FROM}  # type: ignore[attr-defined]
        save_customized(customised, target, batch, self.pretrained, data)
        self.show(batch, customised, seconds, folder)
        print(f"Customised model: {target}")
        self.model = customised

    def show(self, user: UserSamples, customised: CustomizedLeNet, seconds: float, folder: Path) -> None:
        """Print accuracy before and after and draw what was repaired."""
        features, labels = self.own(user.test)
        _, mixed, routing = both_experts(customised, features)
        before, after = features.logits.argmax(1), mixed.argmax(1)
        name = f"{user.user} (synthetic)" if user.synthetic else user.user
        learned = len(user.train) + len(user.val)
        row = {
            "learned from": learned,
            "held back": len(user.test),
            "before (%)": accuracy(features.logits, labels),
            "after (%)": accuracy(mixed, labels),
            "asked the local expert (%)": 100 * (routing.expert_index == 1).float().mean().item(),
            "seconds": seconds,
        }
        print_table(f"{name}: accuracy on samples that were held back", [row])
        if customised.threshold >= 1:
            print("By your own samples the local expert does not help clearly enough: the gate stays closed.")
        if ((before != labels) & (after == labels)).any():
            title = f"{name}: wrong before, right after {learned} samples"
            figure = folder / f"repairs-{user.user}.png"
            print(f"What it repaired: {plot_repairs(user.test.images, labels, before, after, title, figure)}")

    def predict_step(self, batch: WholeUser, batch_idx: int) -> list[Mapping[str, Any]]:
        """Classify all samples of a user with the model as it is: one row per sample."""
        done = len(self.prediction_rows)
        self.keep_predictions(batch.ids, batch.samples, self.model, self.own(batch.samples))
        return self.prediction_rows[done:]

    @torch.no_grad()
    def own(self, samples: Samples) -> tuple[Features, Tensor]:
        """Features and merged labels of samples."""
        return self.model.features(to_float(samples.images)), merge(samples.labels)

    def on_test_start(self) -> None:
        """Begin new results.

        Raises:
            ValueError: There are no generic test images to score on.
        """
        if getattr(self.trainer.datamodule, "generic", None) == "none":  # type: ignore[attr-defined]
            raise ValueError("There are no generic test images: testing needs --data.generic npz or generated.")
        self.generic, self.rows, self.prediction_rows = [], [], []

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Keep the features of generic images; customise for a user and score."""
        if not isinstance(batch, UserSamples):
            images, labels = batch
            self.generic.append((self.model.features(images), labels))
            return
        customised, seconds = self.learn(batch)
        own = self.own(batch.test)
        row = score_user(customised, own, self.all_generic())
        self.rows.append({"user": batch.user, "seed": batch.seed, **row, "seconds": seconds})
        ids = [f"{batch.user}/{batch.seed}/{number}" for number in range(len(batch.test))]
        self.keep_predictions(ids, batch.test, customised, own)

    def all_generic(self) -> tuple[Features, Tensor]:
        """Features and labels of all generic images."""
        if len(self.generic) > 1:
            parts, labels = zip(*self.generic, strict=True)
            columns = zip(*((part.early, part.hidden, part.logits) for part in parts), strict=True)
            self.generic = [(Features(*(torch.cat(column) for column in columns)), torch.cat(labels))]
        return self.generic[0]

    def keep_predictions(
        self, ids: Sequence[str], samples: Samples, model: CustomizedLeNet, own: tuple[Features, Tensor]
    ) -> None:
        """One row per sample: what it is, what both said, and who answered."""
        features, labels = own
        _, mixed, routing = both_experts(model, features)
        answers = zip(
            ids,
            samples.labels.tolist(),
            labels.tolist(),
            features.logits.argmax(1).tolist(),
            mixed.argmax(1).tolist(),
            routing.expert_index[:, 0].tolist(),
            strict=True,
        )
        for name, character, label, before, after, expert in answers:
            row: Mapping[str, Any] = {
                "id": name,
                "character": CHARACTERS[character],
                "target": MERGED_CHARACTERS[label],
                "global_prediction": MERGED_CHARACTERS[before],
                "prediction": MERGED_CHARACTERS[after],
                "expert": ("global", "local")[expert],
            }
            self.prediction_rows.append(row)

    def report(self, folder: Path) -> dict[str, float]:
        """Print the table over all users; write `metrics.json`, `predictions.parquet` and `users.png`."""
        columns = [
            "user",
            "seed",
            "ge",
            "le",
            "moe",
            "oracle",
            "random",
            "generic_ge",
            "generic_moe",
            "route",
            "seconds",
        ]
        print_table("Accuracy on each user's own test samples and on generic ones (%)", self.rows, columns)
        metrics = summarize(self.rows, self.model)
        print_table("All users", [{"metric": name, "value": value} for name, value in metrics.items()])
        write_metrics(folder, metrics)
        write_predictions(folder, self.prediction_rows)
        plot_users(self.rows, folder / "users.png")
        return metrics


def golden_images(like: Tensor) -> Tensor:
    """Images for the golden input of a checkpoint: this is given away, and a person's hand is not ours to give.

    Args:
        like: `(B, ...)` images.
    """
    return torch.rand(to_float(like).shape, generator=torch.Generator().manual_seed(0))


# Arguments of `UserDataModule` that `moe-zoo test` and `predict` of a customised model take over from its learning. The
# user's folder is not among them, since it may be gone: they ask for it.
LEARNED_FROM = ("source", "user", "seeds", "max_samples", "generic")


def save_customized(
    model: CustomizedLeNet, folder: Path, user: UserSamples, base: str, data: Mapping[str, Any]
) -> None:
    """Save a customised model as a checkpoint of its own, loadable by `zoo.load(folder)`.

    Args:
        model: The model.
        folder: Where to.
        user: What it learned from.
        base: The checkpoint that it was.
        data: Arguments of `UserDataModule` with which `moe-zoo test` and `predict` find the user's samples.
    """
    card = hub.Card(
        title=f"{base} customised for {user.user}",
        task="handwritten character recognition",
        description="The global expert is unchanged; a local expert and a gate were learned from one user's samples.",
        data=f"{len(user.train) + len(user.val)} samples of {user.user}" + (" (synthetic)" if user.synthetic else ""),
        data_terms="the user's own",
        weights_licence="the user's own",
        classes=list(MERGED_CHARACTERS[: model.num_classes]),
        preprocessing=PREPROCESSING,
    )
    config = yaml.safe_load((hub.assets() / "configs/customization/users.yaml").read_text())
    config["data"]["init_args"] |= data
    hub.save(model, folder, card=card, golden_input=golden_images(user.test.images[:4]), config=config)
