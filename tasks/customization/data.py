"""Handwriting: generic characters for the global expert, and the samples of single users."""

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tasks.customization.characters import CHARACTERS, MERGED_CHARACTERS, folder_name, label_of_folder, merge
from tasks.customization.strokes import SIDE, SyntheticWriter
from zoo.data import ENVIRONMENT_VARIABLE, ZooDataModule, check_disjoint, find
from zoo.errors import DataNotFoundError, UnknownNameError

HOW_TO_GET_CHARACTERS = (
    "This file is part of the development data; without it use source=torchvision (the official EMNIST download), "
    "source=folder or source=generated."
)
# The arguments that have an effect on one source alone.
CHARACTER_SOURCES: Mapping[str, Sequence[str]] = {
    "npz": (),
    "torchvision": ("split",),
    "folder": ("folder",),
    "generated": ("writers", "samples_per_class"),
}
USER_SOURCES: Mapping[str, Sequence[str]] = {"unipen": (), "folder": ("folder",), "synthetic": ()}
FRACTIONS = (0.6, 0.2, 0.2)
# With fewer, the three parts of the 60/20/20 split cannot all be filled.
MIN_SAMPLES = 5
SMALL_CLASS = 5
MIN_INK = 64


@dataclass(slots=True)
class Samples:
    """Images and their labels.

    Attributes:
        images: `(N, 28, 28)` uint8, upright, white ink on black.
        labels: `(N,)` int64; 0..61 for users, 0..46 where said to be merged.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> "Samples":
        return Samples(self.images[index], self.labels[index])


@dataclass(slots=True)
class UserSamples:
    """One user's samples, split.

    Attributes:
        user: Name.
        seed: Seed of the split.
        train: For learning.
        val: For all choices.
        test: For the score alone.
        synthetic: Whether a program wrote them.
    """

    user: str
    seed: int
    train: Samples
    val: Samples
    test: Samples
    synthetic: bool = False


@dataclass(slots=True)
class WholeUser:
    """All of one user's samples, for prediction.

    Attributes:
        samples: In the order of the source.
        ids: `<user>/<class folder>/<file>` of images from a folder, else `<user>/<place in the source>`.
    """

    samples: Samples
    ids: list[str]


def to_float(images: Tensor) -> Tensor:
    """uint8 `(N, 28, 28)` to float `(N, 1, 28, 28)` in 0..1, what every model here takes."""
    return images.unsqueeze(1).float() / 255


class CharacterDataset(Dataset[tuple[Tensor, Tensor]]):
    """Batches of float images `(N, 1, 28, 28)` in 0..1 and merged labels `(N,)`."""

    def __init__(self, samples: Samples) -> None:
        """Wrap samples whose labels are merged."""
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Fetch a whole batch at once, many times faster than one sample after the other."""
        batch = self.samples[torch.tensor(indices)]
        return to_float(batch.images), batch.labels


def keep_batch(batch: Any) -> Any:
    """The collate function of datasets that fetch whole batches."""
    return batch


def check_source(data: ZooDataModule, source: str, arguments: Mapping[str, Sequence[str]]) -> None:
    """Refuse an unknown source, and arguments that would have no effect on the one that is named.

    Args:
        data: A datamodule that has set them.
        source: Its source.
        arguments: Names of those that have an effect on one source alone, by that source.

    Raises:
        UnknownNameError: There is no such source.
        ValueError: An argument of another source differs from its default.
    """
    if source not in arguments:
        raise UnknownNameError("source of characters", source, arguments)
    defaults = signature(type(data)).parameters
    for other, names in arguments.items():
        for name in names:
            value = getattr(data, name)
            if other != source and value != defaults[name].default:
                raise ValueError(f"{name}={value!r} has no effect on source={source!r}: it is for source={other!r}.")


class CharacterDataModule(ZooDataModule):
    """Generic handwriting for the global expert: images in 0..1 and labels of the 47 merged classes."""

    def __init__(
        self,
        root: str | None = None,
        source: Literal["npz", "torchvision", "folder", "generated"] = "npz",
        split: Literal["byclass", "bymerge", "balanced", "letters", "digits", "mnist"] = "byclass",
        folder: str | None = None,
        writers: int = 20,
        samples_per_class: int = 5,
        batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        """Describe the data; nothing is read before `setup`.

        Args:
            root: Data root with `characters/`, or where torchvision keeps its downloads; else `MOE_ZOO_DATA`. Without
                either, torchvision downloads into the current folder.
            source: `npz` reads `characters/emnist_byclass.npz` (its own split column) and, for training, all of
                `emnist_bymerge_extra.npz`; `torchvision` the official EMNIST; `folder` class folders
                `digit_0/*.png`, `upper_A`, `lower_a`; `generated` draws stroke fonts (synthetic).
            split: EMNIST split of `torchvision`. `letters` has one class for both cases and counts as upper case.
            folder: The folder of `source=folder`; split 60/20/20 per class.
            writers: Number of synthetic writers of `generated`.
            samples_per_class: Samples per class and synthetic writer.
            batch_size: Images per batch.
            num_workers: Processes that load.
            seed: Seed of order, splits and generated writers.

        Raises:
            UnknownNameError: There is no such source.
            ValueError: An argument has no effect on it.
        """
        super().__init__(batch_size, num_workers, seed)
        self.save_hyperparameters()
        self.root = root
        self.source = source
        self.split = split
        self.folder = folder
        self.writers = writers
        self.samples_per_class = samples_per_class
        check_source(self, source, CHARACTER_SOURCES)

    def prepare_data(self) -> None:
        """Download EMNIST where torchvision is the source."""
        if self.source == "torchvision":
            self.torchvision_emnist(train=True, download=True)

    def setup(self, stage: str | None = None) -> None:
        """Read the parts and check that training and test share no image."""
        parts = {
            "npz": self.from_npz,
            "torchvision": self.from_torchvision,
            "folder": self.from_folder,
            "generated": self.from_generator,
        }[self.source]()
        self.train_set, self.val_set, self.test_set = (CharacterDataset(part) for part in parts)

    def loader(self, dataset: Dataset[Any], shuffle: bool = False, **options: Any) -> DataLoader[Any]:
        """A loader that fetches whole batches."""
        return super().loader(dataset, shuffle, collate_fn=keep_batch, **options)

    def from_npz(self) -> list[Samples]:
        """The two files of `characters/`, merged labels."""
        with np.load(find(self.root, "characters/emnist_byclass.npz", HOW_TO_GET_CHARACTERS)) as file:
            split = torch.from_numpy(file["split"].astype(np.int64))
            samples = Samples(
                torch.from_numpy(file["images"]), merge(torch.from_numpy(file["labels"].astype(np.int64)))
            )
        with np.load(find(self.root, "characters/emnist_bymerge_extra.npz", HOW_TO_GET_CHARACTERS)) as file:
            order = torch.tensor([MERGED_CHARACTERS.index(str(name)) for name in file["classes"]])
            labels = order[torch.from_numpy(file["labels"].astype(np.int64))]
            extra = Samples(torch.from_numpy(file["images"]), labels)
        train, val, test = (samples[(split == part).nonzero().flatten()] for part in range(3))
        train = Samples(torch.cat([train.images, extra.images]), torch.cat([train.labels, extra.labels]))
        return [train, val, test]

    @property
    def download_root(self) -> str:
        """Where torchvision keeps its downloads."""
        return self.root or os.environ.get(ENVIRONMENT_VARIABLE) or "."

    def torchvision_emnist(self, train: bool, download: bool = False) -> Any:
        """The dataset of torchvision, whose images are transposed."""
        from torchvision.datasets import EMNIST

        return EMNIST(self.download_root, split=self.split, train=train, download=download)

    def from_torchvision(self) -> list[Samples]:
        """The official EMNIST, upright; a tenth of its training part is held out for validation."""
        if self.split == "byclass":
            warnings.warn(
                "The shipped global experts were trained on 80 % of EMNIST ByClass's official test set: "
                "their score on torchvision's test part is too good.",
                stacklevel=2,
            )
        parts = []
        for train in (True, False):
            try:
                dataset = self.torchvision_emnist(train)
            except RuntimeError as error:
                raise DataNotFoundError(
                    f"EMNIST {self.split}", [self.download_root], "Run with network once, so that it is downloaded."
                ) from error
            images = dataset.data.transpose(1, 2).contiguous()
            parts.append(Samples(images, self.merged_torchvision_labels(dataset.targets.long())))
        held_out = torch.randperm(len(parts[0]), generator=torch.Generator().manual_seed(self.seed))
        cut = len(parts[0]) // 10
        return [parts[0][held_out[cut:]], parts[0][held_out[:cut]], parts[1]]

    def merged_torchvision_labels(self, labels: Tensor) -> Tensor:
        """Labels of any EMNIST split to the 47 merged classes."""
        if self.split == "byclass":
            return merge(labels)
        return labels - 1 + CHARACTERS.index("A") if self.split == "letters" else labels

    def from_folder(self) -> list[Samples]:
        """Class folders of the user's own, split 60/20/20 per class."""
        samples = read_class_folders(Path(self.folder or ""))
        return [Samples(part.images, merge(part.labels)) for part in split_samples(samples, self.seed)]

    def from_generator(self) -> list[Samples]:
        """Synthetic writers, split by writer."""
        count = max(self.writers // 5, 1)
        groups = {"val": range(count), "test": range(count, 2 * count), "train": range(2 * count, self.writers)}
        check_disjoint(groups)
        parts = {}
        for name, seeds in groups.items():
            written = [write_all_classes(self.seed * 1000 + seed, self.samples_per_class) for seed in seeds]
            parts[name] = Samples(
                torch.cat([samples.images for samples in written]),
                merge(torch.cat([samples.labels for samples in written])),
            )
        return [parts["train"], parts["val"], parts["test"]]


class UserDataModule(ZooDataModule):
    """Single users' samples, one user per batch, and generic test images to see what customization costs elsewhere.

    The test part has two loaders: generic images, then users. Prediction takes all samples, unsplit.
    """

    def __init__(
        self,
        root: str | None = None,
        user: str | None = None,
        source: Literal["unipen", "folder", "synthetic"] = "unipen",
        folder: str | None = None,
        seeds: Sequence[int] = (0,),
        max_samples: int | None = None,
        generic: Literal["npz", "generated", "none"] = "npz",
        batch_size: int = 1000,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        """Describe the data; nothing is read before `setup`.

        Args:
            root: Data root with `characters/`; else `MOE_ZOO_DATA`.
            user: One user; None is every user of the source (of `unipen_users.json` for `unipen`).
            source: `unipen` reads `characters/unipen.npz`; `folder` reads `<user>/<digit_0 | upper_A | lower_a>/*.png`
                below `folder`; `synthetic` draws stroke fonts for the users `synthetic-0`, `synthetic-1`, ...
            folder: The folder of `source=folder`.
            seeds: Seeds of the 60/20/20 split; testing visits every user with every seed.
            max_samples: Learn from only this many of a user's training and validation samples together.
            generic: Where the generic test images come from.
            batch_size: Generic images per batch.
            num_workers: Processes that load.
            seed: Seed of generated data.

        Raises:
            UnknownNameError: There is no such source.
            ValueError: An argument has no effect on it.
        """
        super().__init__(batch_size, num_workers, seed)
        self.save_hyperparameters()
        self.root = root
        self.user = user
        self.source = source
        self.folder = folder
        self.seeds = list(seeds)
        self.max_samples = max_samples
        self.generic = generic
        check_source(self, source, USER_SOURCES)

    def setup(self, stage: str | None = None) -> None:
        """Read the users; split their samples unless they are to be predicted.

        Raises:
            UnknownNameError: There is no such user.
            ValueError: A user's samples cannot be split.
        """
        readers = {"unipen": self.from_unipen, "folder": self.from_folder, "synthetic": self.from_generator}
        self.samples = readers[self.source]()
        if stage != "predict":
            self.users = [
                split_user(user, samples, seed, self.max_samples, synthetic=self.source == "synthetic")
                for seed in self.seeds
                for user, samples in self.samples.items()
            ]

    def known(self, names: Sequence[str]) -> None:
        """Raise `UnknownNameError` if the user is none of these."""
        if self.user is not None and self.user not in names:
            raise UnknownNameError("user", self.user, names)

    def from_unipen(self) -> dict[str, Samples]:
        """The writers of `unipen.npz`; without a name, those of `unipen_users.json`."""
        with np.load(find(self.root, "characters/unipen.npz", HOW_TO_GET_CHARACTERS)) as file:
            names = [str(name) for name in file["writer_names"]]
            self.known(names)
            listed = json.loads(find(self.root, "characters/unipen_users.json", HOW_TO_GET_CHARACTERS).read_text())
            images, labels, writers = torch.from_numpy(file["images"]), file["labels"].astype(np.int64), file["writers"]
        chosen = [self.user] if self.user else listed["users"]
        found = {}
        for name in chosen:
            index = torch.from_numpy(np.flatnonzero(writers == names.index(name)))
            found[name] = Samples(images[index], torch.from_numpy(labels)[index])
        return found

    def from_folder(self) -> dict[str, Samples]:
        """One folder per user below `folder`."""
        folder = Path(self.folder or "")
        if not self.folder or not folder.is_dir():
            raise DataNotFoundError(
                "the users' folder", [self.folder or "(none given)"], "Name it with --data.folder DIR."
            )
        names = sorted(path.name for path in folder.iterdir() if path.is_dir())
        if not names:
            raise DataNotFoundError("any user", [folder / "<user>"], "Expected a folder per user in it.")
        with suppress(ValueError):
            label_of_folder(names[0])
            raise DataNotFoundError(
                "the users", [folder], f"{names[0]} names a class: put the class folders into {folder}/<your name>/."
            )
        self.known(names)
        return {name: read_class_folders(folder / name) for name in ([self.user] if self.user else names)}

    def from_generator(self) -> dict[str, Samples]:
        """Synthetic writers; the user's number is the seed of the hand."""
        names = [f"synthetic-{number}" for number in range(100)]
        self.known(names)
        return {
            name: write_all_classes(10_000 + int(name.split("-")[1]), 12)
            for name in ([self.user] if self.user else names[:2])
        }

    def train_dataloader(self) -> DataLoader[Any]:
        """One batch: the user."""
        if len(self.users) != 1:
            found = ", ".join(f"{user.user} (seed {user.seed})" for user in self.users)
            raise ValueError(
                f"fit customises one user at a time, found {found}: "
                "name one with --data.user NAME and one seed with --data.seeds '[0]'."
            )
        return self.user_loader()

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Generic images, then users."""
        return [*self.generic_loaders(), self.user_loader()]

    def predict_dataloader(self) -> DataLoader[Any]:
        """One user per batch, each once, as `WholeUser`."""
        users = [WholeUser(samples, self.sample_ids(user)) for user, samples in self.samples.items()]
        return DataLoader(users, batch_size=None)  # type: ignore[arg-type]

    def sample_ids(self, user: str) -> list[str]:
        """What leads from a prediction back to its sample, see `WholeUser`."""
        if self.source == "folder":
            folder = Path(self.folder or "")
            return [path.relative_to(folder).as_posix() for path, _ in list_class_folders(folder / user)]
        return [f"{user}/{number}" for number in range(len(self.samples[user]))]

    def user_loader(self) -> DataLoader[Any]:
        """One user and seed per batch, as `UserSamples`."""
        return DataLoader(self.users, batch_size=None)  # type: ignore[arg-type]

    def generic_loaders(self) -> list[DataLoader[Any]]:
        """The generic test images, or nothing."""
        if self.generic == "none":
            return []
        few: dict[str, Any] = {"writers": 5, "samples_per_class": 2} if self.generic == "generated" else {}
        module = CharacterDataModule(self.root, self.generic, batch_size=self.batch_size, seed=self.seed, **few)
        module.setup()
        return [module.test_dataloader()]


def split_samples(samples: Samples, seed: int, fractions: Sequence[float] = FRACTIONS) -> list[Samples]:
    """Split into training, validation and test, stratified by class.

    Classes of fewer than five samples are pooled into one group, which is then split like a class: each of their
    samples still lands in every part with the same probability, but such a class can be missing from a part.

    Args:
        samples: All samples.
        seed: Seed of the split.
        fractions: Shares of the three parts.
    """
    random = np.random.default_rng(seed)
    labels = samples.labels.numpy()
    classes, counts = np.unique(labels, return_counts=True)
    small = np.isin(labels, classes[counts < SMALL_CLASS])
    groups = [np.flatnonzero((labels == c) & ~small) for c in classes[counts >= SMALL_CLASS]]
    parts: list[list[NDArray[np.int64]]] = [[], [], []]
    for group in [*groups, np.flatnonzero(small)]:
        shuffled = random.permutation(group)
        # A random offset spreads what rounding gives and takes evenly over the parts.
        position = (np.arange(len(group)) + random.random()) / max(len(group), 1)
        part_of = np.searchsorted(np.cumsum(fractions)[:-1], position, side="right")
        for part in range(3):
            parts[part].append(shuffled[part_of == part])
    return [samples[torch.from_numpy(np.sort(np.concatenate(part)))] for part in parts]


def split_user(
    user: str, samples: Samples, seed: int, max_samples: int | None = None, synthetic: bool = False
) -> UserSamples:
    """Split one user's samples 60/20/20; the test part does not depend on `max_samples`.

    Args:
        user: Name.
        samples: All samples, labels 0..61.
        seed: Seed of the split.
        max_samples: Keep only this many of training and validation together, three quarters of them for training.
        synthetic: Whether a program wrote them.

    Raises:
        ValueError: There are fewer than five samples, only one class, or labels outside 0..61.
    """
    if len(samples) < MIN_SAMPLES:
        raise ValueError(
            f"User {user!r} has {len(samples)} samples; at least {MIN_SAMPLES} are needed to learn from some and "
            "check on others. Write more characters."
        )
    outside = sorted(set(samples.labels[(samples.labels < 0) | (samples.labels >= len(CHARACTERS))].tolist()))
    if outside:
        raise ValueError(f"User {user!r} has labels {outside}; allowed are 0..{len(CHARACTERS) - 1} (0-9, A-Z, a-z).")
    classes = samples.labels.unique().tolist()
    if len(classes) < 2:
        raise ValueError(
            f"User {user!r} wrote only {folder_name(classes[0])}; a local expert needs samples of at least two classes."
        )
    train, val, test = split_samples(samples, seed)
    if max_samples is not None:
        random = torch.Generator().manual_seed(seed)
        kept_train = min(len(train), max(1, round(0.75 * max_samples)))
        kept_val = min(len(val), max(1, max_samples - kept_train))
        train = train[torch.randperm(len(train), generator=random)[:kept_train]]
        val = val[torch.randperm(len(val), generator=random)[:kept_val]]
    return UserSamples(user, seed, train, val, test, synthetic)


def read_class_folders(folder: Path) -> Samples:
    """Read the images that `list_class_folders` finds, in that order.

    Raises:
        DataNotFoundError: The folder or any image in it is missing.
        ValueError: A folder names no class, or an image is unreadable, of another size or black on white.
    """
    paths, labels = zip(*list_class_folders(folder), strict=True)
    return Samples(torch.from_numpy(np.stack([read_image(path) for path in paths])), torch.tensor(labels))


def list_class_folders(folder: Path) -> list[tuple[Path, int]]:
    """The images of `<digit_0 | upper_A | lower_a>/*.png` below a folder, and their labels.

    Raises:
        DataNotFoundError: The folder or any image in it is missing.
        ValueError: A folder names no class.
    """
    if not folder.is_dir():
        raise DataNotFoundError("the folder of class folders", [folder], "Name it with --data.folder DIR.")
    found: list[tuple[Path, int]] = []
    for class_folder in sorted(path for path in folder.iterdir() if path.is_dir()):
        label = label_of_folder(class_folder.name)
        found += [(path, label) for path in sorted(class_folder.glob("*.png"))]
    if not found:
        raise DataNotFoundError("any image", [folder / "digit_0" / "*.png"], "Expected class folders with PNG files.")
    return found


def read_image(path: Path) -> NDArray[np.uint8]:
    """Read one 28 x 28 image with white ink on black; what is transparent counts as black.

    Raises:
        ValueError: It is unreadable, of another size, blank, or its border is bright, as black ink on white has it.
    """
    try:
        with Image.open(path) as image:
            transparent = image.has_transparency_data
            ink = image.convert("RGBA")
            flat = Image.alpha_composite(Image.new("RGBA", image.size, "black"), ink)
            pixels = np.asarray(flat.convert("L"))
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}.") from None
    if pixels.shape != (SIDE, SIDE):
        raise ValueError(f"{path} is {pixels.shape[1]} x {pixels.shape[0]} pixels; expected {SIDE} x {SIDE}.")
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    if border.mean() > 127:
        raise ValueError(f"{path} seems to be black on white (mean of its border is {border.mean():.0f}): invert it.")
    if pixels.max() < MIN_INK:
        why = (
            "it is transparent, and its ink is black: put it on white and invert it" if transparent else "leave it out"
        )
        raise ValueError(f"{path} holds no ink (its brightest pixel is {pixels.max()} of 255): {why}.")
    return pixels


def write_all_classes(seed: int, samples_per_class: int) -> Samples:
    """Have a synthetic writer write every class several times."""
    writer = SyntheticWriter(seed)
    labels = [label for label in range(len(CHARACTERS)) for _ in range(samples_per_class)]
    return Samples(torch.from_numpy(np.stack([writer.write(CHARACTERS[c]) for c in labels])), torch.tensor(labels))
