"""Pairs of infrared and visible images: the public sets in their own layouts, two folders of the user's, or generated.

A set without an official split is divided by blocks of neighbouring frames, since neighbours are near-duplicates.
"""

import csv
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tasks.fusion.images import LUMINANCE, SUFFIXES, luminance, read_pixels, read_size, to_tensor, to_ycbcr
from tasks.fusion.losses import WINDOW
from zoo.data import EpochSampler, LateLoader, ZooDataModule, check_disjoint, find
from zoo.errors import DataNotFoundError, UnknownNameError

Pixels = NDArray[np.uint8] | NDArray[np.uint16]


class PublicSet(NamedTuple):
    """A public set of pairs.

    Attributes:
        folder: Where it lies below `fusion/` in the data root.
        how_to_get: A sentence for those who do not have it.
        split: What its pairs are if its layout does not say; None divides them by `is_test_frame`.
    """

    folder: str
    how_to_get: str
    split: str | None = None


SETS = {
    "roadscene": PublicSet("roadscene", "Clone https://github.com/hanna-xu/RoadScene as fusion/roadscene."),
    "msrs": PublicSet("msrs", "Clone https://github.com/Linfeng-Tang/MSRS as fusion/msrs."),
    "msrs_detection": PublicSet(
        "msrs/detection", "Clone https://github.com/Linfeng-Tang/MSRS as fusion/msrs: it holds detection/."
    ),
    "llvip": PublicSet(
        "llvip", "Request LLVIP (non-commercial research) at https://bupt-ai-cz.github.io/LLVIP/ as fusion/llvip."
    ),
    "llvip_mini": PublicSet("llvip_mini", "It is part of the development data; the whole set is the source llvip."),
    "m3fd": PublicSet("m3fd", "Get M3FD_Detection through https://github.com/JinyuanLiu-CV/TarDAL as fusion/m3fd."),
    "m3fd_fusion": PublicSet(
        "m3fd_fusion", "Get M3FD_Fusion through https://github.com/JinyuanLiu-CV/TarDAL as fusion/m3fd_fusion.", "test"
    ),
    "tno": PublicSet(
        "tno",
        "Get TNO at https://figshare.com/articles/dataset/TNO_Image_Fusion_Dataset/1008029 and put one frame of each "
        "scene under the same name into fusion/tno/ir and fusion/tno/vi.",
        "test",
    ),
}

# What the user's own pairs are called where sets have their names.
OWN = "own"
# Official layouts: infrared and visible folders by split, compared without case; the first that is there is read.
LAYOUTS: Mapping[str, Mapping[str | None, tuple[str, str]]] = {
    "MSRS": {"train": ("train/ir", "train/vi"), "val": ("val/ir", "val/vi"), "test": ("test/ir", "test/vi")},
    "LLVIP": {"train": ("infrared/train", "visible/train"), "test": ("infrared/test", "visible/test")},
    "RoadScene": {None: ("cropinfrared", "crop_LR_visible")},
    "M3FD": {None: ("Ir", "Vis")},
    "two folders": {None: ("ir", "vi")},
}
# VOC files (LLVIP, M3FD) or YOLO files (MSRS), by the image's stem.
ANNOTATION_FOLDERS = ("Annotations", "Annotation", "labels")
SPLITS = ("train", "val", "test")
NIGHT_BY_TIME = {"day": False, "night": True}
# MSRS names say D or N.
NIGHT_BY_NAME = re.compile(r"\d{5}([DN])")
# Mean luminance below which a visible image of unknown time counts as taken at night: right for all of llvip_mini and
# 27 of 30 MSRS pairs; RoadScene's nights are lit and exposed like days and need pairs.csv.
NIGHT_BELOW = 0.3
# This frame repeats the scene of FLIR_video_02829, a test frame.
REPEATS_A_TEST_FRAME = "FLIR_09465"
# Decoded pixels that a training or validation set keeps in memory.
KEPT_BYTES = 2**30
LISTED = 10

GENERATED_SIZE = (256, 192)
GENERATED_COUNTS = {"train": 24, "test": 8}


@dataclass(slots=True)
class Pairs:
    """A batch of pairs of one size; not frozen, since Lightning sets its fields when it moves it to a device.

    Attributes:
        infrared: `(B, 1, H, W)` in 0..1.
        visible: `(B, 1, H, W)`, its luminance in 0..1.
        chroma: `(B, 2, H, W)`, its Cb and Cr in -0.5..0.5; zeros where it is grey.
        names: The visible files' stems.
        night: `(B,)` bool.
        boxes: For each pair `(N, 4)`, xyxy in its pixels; None unless every pair of the batch is annotated.
        labels: For each pair the names of its N objects.
    """

    infrared: Tensor
    visible: Tensor
    chroma: Tensor
    names: list[str]
    night: Tensor
    boxes: list[Tensor] | None
    labels: list[list[str]] | None

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A pair that has not been decoded.

    Attributes:
        source: The set's name, or `own`.
        name: The visible file's stem.
        split: `train`, `val`, `test`, or None if it can be either.
        night: Whether it was taken at night; None if its brightness has to tell.
        size: Width and height.
        boxes: `(N, 4)` xyxy in pixels, or None where nobody annotated it.
        labels: The names of the N objects.
    """

    source: str
    name: str
    split: str | None = None
    night: bool | None = None
    size: tuple[int, int] = (0, 0)
    boxes: Tensor | None = None
    labels: tuple[str, ...] = ()

    def inspect(self) -> "Pair":
        """The same pair with its size and boxes; raise a ValueError if it cannot be used."""
        return self

    def read(self) -> tuple[Pixels, Pixels]:
        """Decode: infrared and visible, `(H, W)` or `(H, W, 3)`, uint8 or uint16."""
        raise TypeError(f"{type(self).__name__} must define read().")


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePair(Pair):
    """Two image files; `inspect` fills in `size`, `boxes` and `labels`.

    Attributes:
        infrared: The infrared file.
        visible: The visible file.
        annotation: A VOC or YOLO file, or a list of `{"label": ..., "xyxy": [...]}`.
    """

    infrared: Path
    visible: Path
    annotation: Path | list[dict[str, Any]] | None = None

    def inspect(self) -> Pair:
        """Look into the headers and the annotation."""
        size, other = read_size(self.visible), read_size(self.infrared)
        if size != other:
            raise ValueError(f"{self.name}: visible {size[0]} x {size[1]}, infrared {other[0]} x {other[1]}")
        boxes, labels = read_boxes(self.annotation, size)
        return replace(self, size=size, boxes=boxes, labels=labels)

    def read(self) -> tuple[Pixels, Pixels]:
        """Decode both files."""
        return read_pixels(self.infrared), read_pixels(self.visible)


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedPair(Pair):
    """A synthetic street: hot targets that only the infrared sees, textures and lamps that only the visible sees.

    Attributes:
        boxes: The hot targets.
        seed: Of everything else.
    """

    boxes: Tensor
    seed: int

    def read(self) -> tuple[Pixels, Pixels]:
        """Draw it."""
        random = np.random.default_rng(self.seed)
        width, height = self.size
        y, x = np.mgrid[:height, :width].astype(np.float32)
        infrared = 0.2 + 0.15 * y / height
        visible = np.stack([0.6 - 0.3 * y / height, 0.65 - 0.3 * y / height, 0.8 - 0.5 * y / height], axis=-1)
        for _ in range(4):
            left, top = random.integers(width - 40), random.integers(height - 40)
            wall = (x >= left) & (x < left + random.integers(40, 90)) & (y >= top) & (y < top + random.integers(40, 90))
            stripes = np.sin(x * random.uniform(0.3, 1.2) + y * random.uniform(0.3, 1.2))
            visible[wall] = random.uniform(0.2, 0.8, 3) + 0.15 * stripes[wall, None]
            infrared[wall] = random.uniform(0.2, 0.4)
        if self.night:
            visible *= 0.15
            for _ in range(2):
                squared = (x - random.uniform(0, width)) ** 2 + (y - random.uniform(0, height / 2)) ** 2
                visible += np.exp(-squared / 200)[..., None] * (1.0, 0.9, 0.6)
        for left, top, right, bottom in self.boxes.tolist():
            across, down = (2 * x - left - right) / (right - left), (2 * y - top - bottom) / (bottom - top)
            infrared[across**2 + down**2 <= 1] = random.uniform(0.8, 1.0)
        noisy = (band + random.normal(0, 0.01, band.shape) for band in (infrared, visible))
        drawn = [(band.clip(0, 1) * 255).round().astype(np.uint8) for band in noisy]
        return drawn[0], drawn[1]


class PairDataset(Dataset[Pairs]):
    """Whole pairs, each a batch of one."""

    def __init__(self, pairs: Sequence[Pair], keep: bool = False) -> None:
        """Nothing is decoded yet.

        Args:
            pairs: The pairs.
            keep: Whether to keep decoded pixels in memory, as long as they take less than `KEPT_BYTES`.
        """
        self.pairs = pairs
        self.keep = keep
        self.kept: dict[int, tuple[Pixels, Pixels, bool]] = {}
        self.kept_bytes = 0

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Pairs:
        pair = self.pairs[index]
        return as_batch(pair, *self.decode(index), pair.boxes, list(pair.labels))

    def decode(self, index: int) -> tuple[Pixels, Pixels, bool]:
        """Pixels of the infrared and the visible image, and whether it is night."""
        if index in self.kept:
            return self.kept[index]
        pair = self.pairs[index]
        infrared, visible = pair.read()
        night = mean_luminance(visible) < NIGHT_BELOW if pair.night is None else pair.night
        size = infrared.nbytes + visible.nbytes
        if self.keep and self.kept_bytes + size <= KEPT_BYTES:
            self.kept[index] = infrared, visible, night
            self.kept_bytes += size
        return infrared, visible, night


class CropDataset(Dataset[Pairs]):
    """Random windows, mirrored or not, the same in both images.

    What a sample is depends on the seed, the epoch and the index alone: `CropSampler` hands over the latter two.
    """

    def __init__(self, whole: PairDataset, crop: int, crops_per_image: int, seed: int) -> None:
        """Describe the windows.

        Args:
            whole: Pairs at least as large as a window.
            crop: Side of a window in pixels.
            crops_per_image: Windows of every pair per epoch.
            seed: Seed of positions and mirroring.
        """
        self.whole = whole
        self.pairs = whole.pairs
        self.crop = crop
        self.crops_per_image = crops_per_image
        self.seed = seed

    def __len__(self) -> int:
        return len(self.whole) * self.crops_per_image

    def __getitem__(self, key: tuple[int, int]) -> Pairs:
        epoch, index = key
        random = np.random.default_rng((self.seed, epoch, index))
        number = index % len(self.whole)
        pair = self.pairs[number]
        infrared, visible, night = self.whole.decode(number)
        left, top = (int(random.integers(side - self.crop + 1)) for side in pair.size)
        mirror, upend = (bool(random.integers(2)) for _ in range(2))

        def window(pixels: Pixels) -> Pixels:
            cut = pixels[top : top + self.crop, left : left + self.crop]
            return cut[:: -1 if upend else 1, :: -1 if mirror else 1]

        boxes, labels = crop_boxes(pair, left, top, self.crop, mirror, upend)
        return as_batch(pair, window(infrared), window(visible), night, boxes, labels)


class CropSampler(EpochSampler):
    """A permutation per epoch; the epoch goes along with every index, also to worker processes."""

    def __iter__(self) -> Iterator[tuple[int, int]]:  # type: ignore[override]
        for index in super().__iter__():
            yield self.epoch, index


class FusionDataModule(ZooDataModule):
    """Pairs of infrared and visible images: random windows for training, whole pairs one by one for the rest."""

    def __init__(
        self,
        root: str | None = None,
        sources: Sequence[str] = ("roadscene", "msrs"),
        test_source: str = "roadscene",
        folder: str | None = None,
        ir: str | None = None,
        vi: str | None = None,
        crop: int = 128,
        crops_per_image: int = 4,
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        """Describe the data; nothing is read before `setup`.

        Args:
            root: Data root with `fusion/`; else `MOE_ZOO_DATA`.
            sources: Sets to train on: roadscene, msrs, msrs_detection, llvip, llvip_mini, m3fd, or generated, which is
                synthetic and needs nothing. About an eighth of their training pairs, in blocks of neighbouring frames,
                is held out for validation.
            test_source: The set whose test pairs are scored: one of these, m3fd_fusion or tno.
            folder: A folder of your own instead of the sets: with `ir/` and `vi/`, in the layout of one of the sets, or
                with a `pairs.csv` (columns name, ir, vi and, if you like, split: train, val or test, and time: day or
                night). Unless it says which pairs are which, `fit` learns from all of it but the validation pairs,
                `test` and `predict` take all of it. To learn from, sides must be at least 11 pixels.
            ir: A folder of infrared images of your own, instead of `folder`.
            vi: The folder of the visible images that have the same stems.
            crop: Side of the training windows in pixels, at least 11.
            crops_per_image: Windows of every training pair per epoch.
            batch_size: Windows per training batch, at least 2 for mixtures; whole pairs come one by one.
            num_workers: Processes that load.
            seed: Seed of order, windows and generated pairs.
        """
        super().__init__(batch_size, num_workers, seed)
        self.save_hyperparameters()
        self.root = root
        self.sources = list(sources)
        self.test_source = test_source
        self.folder = folder
        self.ir = ir
        self.vi = vi
        self.crop = crop
        self.crops_per_image = crops_per_image

    def setup(self, stage: str | None = None) -> None:
        """List the pairs that the stage needs, look into every file's header and check that no parts overlap."""
        own = self.read_own()
        if stage in (None, "fit", "validate"):
            if not (own or self.sources):
                raise ValueError(
                    "--data.sources names no set: nothing to learn from. Name your own pairs with --data.ir DIR "
                    "--data.vi DIR, or --data.folder DIR."
                )
            divided = [split_validation(pairs) for pairs in ([own] if own else map(self.read_set, self.sources))]
            train, val = (inspect_all([pair for part in divided for pair in part[i]]) for i in range(2))
            check_sizes([*train, *val], self.crop)
            check_crop(train, self.crop)
            self.train_set = CropDataset(PairDataset(train, keep=True), self.crop, self.crops_per_image, self.seed)
            self.val_set = PairDataset(val, keep=True)
        if stage in (None, "test") or (stage == "predict" and not own):
            candidates = own or self.read_set(self.test_source)
            self.test_set = PairDataset(inspect_all(choose(candidates, "test", None)))
        if stage == "predict" and own:
            self.predict_set = PairDataset(inspect_all(own))
        parts = self.pairs_by_part().items()
        check_disjoint(
            {part: [(pair.source, pair.name) for pair in pairs] for part, pairs in parts if part != "predict"}
        )

    def pairs_by_part(self) -> dict[str, Sequence[Pair]]:
        """The pairs of the parts that `setup` has filled."""
        parts = {name: getattr(self, f"{name}_set") for name in ("train", "val", "test", "predict")}
        return {name: part.pairs for name, part in parts.items() if part is not None}

    def describe(self) -> str:
        """What training uses, in words for a model card."""
        parts = self.pairs_by_part()
        counts = Counter("generated (synthetic)" if p.source == "generated" else p.source for p in parts["train"])
        trained = ", ".join(f"{count} pairs of {source}" for source, count in counts.items())
        return f"{trained}; {len(parts['val'])} pairs held out for validation"

    def instead_of_sets(self) -> dict[str, Any]:
        """Arguments that keep a checkpoint of the user's own pairs from being tested on a set; none without such pairs.

        With them `test` asks for a folder.
        """
        return {"sources": [], "test_source": OWN} if self.folder or self.ir else {}

    def source_folders(self) -> list[Path]:
        """The folders that the images come from, where no result may be written."""
        pairs = [pair for part in self.pairs_by_part().values() for pair in part if isinstance(pair, FilePair)]
        return sorted({path.parent for pair in pairs for path in (pair.infrared, pair.visible)})

    def loader(self, dataset: Dataset[Any], shuffle: bool = False, **options: Any) -> DataLoader[Any]:
        """Windows in batches, whole pairs one by one."""
        count = len(dataset)  # type: ignore[arg-type]
        # A mixture's gates are standardised over a batch: where the last would hold a single window it gets another.
        windows = count + int(count % max(1, self.batch_size) == 1)
        return LateLoader(
            dataset,
            batch_size=self.batch_size if shuffle else 1,
            sampler=CropSampler(windows, self.seed) if shuffle else None,
            num_workers=self.num_workers,
            collate_fn=collate,
            generator=torch.Generator().manual_seed(self.seed),
            **options,
        )

    def read_own(self) -> list[FilePair]:
        """The user's own pairs, or an empty list if no folder is named.

        Raises:
            ValueError: Only one of the two folders is named, or `folder` beside them.
        """
        if self.folder and not (self.ir or self.vi):
            return read_folder(Path(self.folder), OWN)
        if self.ir and self.vi and not self.folder:
            return pair_up(Path(self.ir), Path(self.vi), OWN)
        if self.folder or self.ir or self.vi:
            given = ", ".join(f"{name}={value}" for name in ("folder", "ir", "vi") if (value := getattr(self, name)))
            raise ValueError(f"Found {given}: name both --data.ir DIR and --data.vi DIR, or --data.folder DIR alone.")
        return []

    def read_set(self, source: str) -> Sequence[Pair]:
        """All pairs of a set, each with its split, in the order of the frames.

        Raises:
            UnknownNameError: There is no such set.
            DataNotFoundError: It is not below the data root.
        """
        if source == "generated":
            return generate_pairs(self.seed)
        if source not in SETS:
            raise UnknownNameError("fusion set", source, [*SETS, "generated"], "For your own use --data.folder DIR.")
        public = SETS[source]
        pairs = read_folder(find(self.root, f"fusion/{public.folder}", public.how_to_get), source)
        if any(pair.split for pair in pairs):
            return pairs
        splits = (public.split or ("test" if is_test_frame(i, pair.name) else "train") for i, pair in enumerate(pairs))
        return [replace(pair, split=split) for pair, split in zip(pairs, splits, strict=True)]


# --- parts -----------------------------------------------------------------------------------------------------------


def frame_order(name: str) -> list[str | int]:
    """Sort key: numbers in a name count as numbers, so that `frame_10` follows `frame_9`."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]


def is_test_frame(index: int, name: str) -> bool:
    """The test part of a set without an official one: every fifth block of eleven frames.

    Args:
        index: The frame's place in the order of all names.
        name: Its name.
    """
    return index // 11 % 5 == 4 or name == REPEATS_A_TEST_FRAME


def is_validation_frame(index: int, count: int) -> bool:
    """The validation part: one block of every eight; a block is five frames, in large sets a 36th of them.

    Args:
        index: The frame's place in the order of the training names.
        count: Number of training frames.
    """
    block = max(math.ceil(count / 36), min(5, count // 6))
    return index // block % 8 == 4


def split_validation(pairs: Sequence[Pair]) -> tuple[list[Pair], list[Pair]]:
    """What to learn from, and what to choose settings by; test pairs are left out.

    Args:
        pairs: All pairs of one source. Its own `val` pairs, if any, are the validation part.

    Raises:
        ValueError: There are too few.
    """
    train, val = ([pair for pair in pairs if pair.split in splits] for splits in (("train", None), ("val",)))
    if train and val:
        return train, val
    held_out = [is_validation_frame(index, len(train)) for index in range(len(train))]
    val = [pair for pair, held in zip(train, held_out, strict=True) if held]
    if not val:
        raise ValueError(
            f"{pairs[0].source} has {len(train)} training pairs; at least 5 are needed to learn from some and "
            "validate with others."
        )
    return [pair for pair, held in zip(train, held_out, strict=True) if not held], val


def choose(pairs: Sequence[Pair], *splits: str | None) -> list[Pair]:
    """The pairs of these splits.

    Raises:
        ValueError: There is none.
    """
    chosen = [pair for pair in pairs if pair.split in splits]
    if not chosen:
        found = ", ".join(sorted({str(pair.split) for pair in pairs}))
        raise ValueError(
            f"{pairs[0].source} has no {splits[0]} pairs, only {found}: choose another set with --data.test_source."
        )
    return chosen


# --- files -----------------------------------------------------------------------------------------------------------


def complain(what: str, items: Sequence[str], advice: str) -> None:
    """Raise a ValueError that lists up to ten of the items, if there are any."""
    if items:
        more = f"; and {len(items) - LISTED} more" if len(items) > LISTED else ""
        raise ValueError(f"{len(items)} {what}: {'; '.join(items[:LISTED])}{more}. {advice}")


def read_folder(folder: Path, source: str) -> list[FilePair]:
    """The pairs of a folder with a `pairs.csv` or in one of the `LAYOUTS`, in the order of the frames.

    Raises:
        DataNotFoundError: It is in none of them.
        ValueError: Files are not paired, two pairs have one name, or `pairs.csv` is wrong.
    """
    if not folder.is_dir():
        raise DataNotFoundError("the folder of pairs", [folder], "Name it with --data.folder DIR.")
    pairs = read_table(folder, source) if (folder / "pairs.csv").exists() else read_layout(folder, source)
    pairs.sort(key=lambda pair: frame_order(pair.name))
    twice = [first.name for first, second in pairwise(pairs) if first.name == second.name]
    complain(f"names of pairs occur twice in {folder}", twice, "Give every pair a name of its own.")
    annotations = find_annotations(folder)
    return [replace(pair, annotation=annotations.get(pair.name)) for pair in pairs]


def read_layout(folder: Path, source: str) -> list[FilePair]:
    """The pairs of a folder in the first of the `LAYOUTS` that is there."""
    for layout in LAYOUTS.values():
        places = {split: [subfolder(folder, path) for path in paths] for split, paths in layout.items()}
        pairs = [
            replace(pair, split=split)
            for split, (infrared, visible) in places.items()
            if infrared and visible
            for pair in pair_up(infrared, visible, source)
        ]
        if pairs:
            return pairs
    expected = "; ".join(f"{a}/ and {b}/" for layout in LAYOUTS.values() for a, b in layout.values())
    raise DataNotFoundError(f"the pairs of {source}", [folder], f"Expected in it pairs.csv, or one of: {expected}.")


def subfolder(folder: Path, path: str) -> Path | None:
    """The folder at a path below another, upper and lower case alike, or None."""
    for part in path.split("/"):
        found = [child for child in folder.iterdir() if child.is_dir() and child.name.lower() == part.lower()]
        if not found:
            return None
        folder = found[0]
    return folder


def read_table(folder: Path, source: str) -> list[FilePair]:
    """The pairs that `pairs.csv` lists: columns name, ir, vi and, if there, split and time (day, night)."""
    with (folder / "pairs.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if missing := {"name", "ir", "vi"} - set(rows[0] if rows else ()):
        raise ValueError(f"{folder / 'pairs.csv'} has no pairs or lacks the columns {', '.join(sorted(missing))}.")
    for number, row in enumerate(rows, 1):
        if not (row["name"] and row["ir"] and row["vi"]):
            found = ", ".join(f"{column}={row[column] or ''}" for column in ("name", "ir", "vi"))
            raise ValueError(f"{folder / 'pairs.csv'}, pair {number}: found {found}. Fill in all three.")
        for column, allowed in (("split", SPLITS), ("time", NIGHT_BY_TIME)):
            if row.get(column) and row[column] not in allowed:
                hint = "Leave it empty if it is not known."
                raise UnknownNameError(f"{column} in {folder / 'pairs.csv'}", row[column], allowed, hint)
    return [
        FilePair(
            source=source,
            name=row["name"],
            infrared=folder / row["ir"],
            visible=folder / row["vi"],
            split=row.get("split") or None,
            night=NIGHT_BY_TIME.get(row.get("time") or ""),
        )
        for row in rows
    ]


def images_by_stem(folder: Path) -> dict[str, Path]:
    """The image files of a folder.

    Raises:
        DataNotFoundError: There is no such folder, or no image in it.
        ValueError: Two files have the same stem.
    """
    if not folder.is_dir():
        raise DataNotFoundError("the folder of images", [folder], "Name two folders with --data.ir and --data.vi.")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.name[0] != ".")
    if not files:
        raise DataNotFoundError("any image", [folder], f"Expected files that end in {', '.join(SUFFIXES)}.")
    by_stem = {file.stem: file for file in files}
    twice = [file.name for file in files if by_stem[file.stem] != file]
    complain(f"files in {folder} share their stem with another", twice, "Keep one file of each stem.")
    return by_stem


def pair_up(infrared: Path, visible: Path, source: str) -> list[FilePair]:
    """Pair the images of two folders by their stems, whatever their suffixes, in the order of the frames.

    Args:
        infrared: Folder of infrared images.
        visible: Folder of visible images.
        source: Name of the set.

    Raises:
        DataNotFoundError: A folder is not there or empty.
        ValueError: Both are one folder, or a file has no partner.
    """
    if infrared.resolve() == visible.resolve():
        raise ValueError(f"The infrared and the visible folder are the same, {infrared}: name two.")
    of_infrared, of_visible = images_by_stem(infrared), images_by_stem(visible)
    alone = sorted(of_infrared.keys() ^ of_visible.keys(), key=frame_order)
    complain(
        "files have no partner",
        [str(of_infrared.get(stem) or of_visible[stem]) for stem in alone],
        "Give both images of a pair the same stem, or move those without a partner away.",
    )
    return [
        FilePair(
            source=source,
            name=stem,
            infrared=of_infrared[stem],
            visible=of_visible[stem],
            night=match[1] == "N" if (match := NIGHT_BY_NAME.fullmatch(stem)) else None,
        )
        for stem in sorted(of_visible, key=frame_order)
    ]


def inspect_all(pairs: Sequence[Pair]) -> list[Pair]:
    """Look into the headers and annotations of all pairs.

    Raises:
        ValueError: Files are unreadable, the images of a pair differ in size, or an annotation is wrong.
    """
    problems, inspected = [], []
    for pair in pairs:
        try:
            inspected.append(pair.inspect())
        except ValueError as error:
            problems.append(str(error).rstrip("."))
    advice = "Replace what is unreadable, register both images to one size, or move the whole pair away."
    complain("pairs cannot be used", problems, advice)
    return inspected


def check_sizes(pairs: Sequence[Pair], crop: int) -> None:
    """Refuse what is smaller than a window of the losses.

    Args:
        pairs: Of training and validation.
        crop: Side of the training windows.

    Raises:
        ValueError: The training windows are, or pairs.
    """
    if crop < WINDOW:
        raise ValueError(f"--data.crop {crop}: the losses need sides of at least {WINDOW} pixels.")
    small = [f"{pair.name}: {pair.size[0]} x {pair.size[1]}" for pair in pairs if min(pair.size) < WINDOW]
    complain(f"pairs have a side below {WINDOW} pixels, which the losses need", small, "Move them away.")


def check_crop(pairs: Sequence[Pair], crop: int) -> None:
    """Refuse training pairs that are smaller than a window."""
    small = [f"{pair.name}: {pair.size[0]} x {pair.size[1]}" for pair in pairs if min(pair.size) < crop]
    if small:
        largest = min(min(pair.size) for pair in pairs)
        complain(f"pairs are smaller than --data.crop {crop}", small, f"Choose at most --data.crop {largest}.")


# --- boxes -----------------------------------------------------------------------------------------------------------


def find_annotations(folder: Path) -> dict[str, Any]:
    """Annotations by the image's stem: `boxes.json`, else VOC or YOLO files in one of `ANNOTATION_FOLDERS`."""
    if (folder / "boxes.json").exists():
        return dict(json.loads((folder / "boxes.json").read_text("utf-8")))
    found = [place for name in ANNOTATION_FOLDERS if (place := subfolder(folder, name))]
    return {file.stem: file for place in found for file in place.iterdir() if file.suffix in BOX_READERS}


def read_boxes(
    annotation: Path | list[dict[str, Any]] | None, size: tuple[int, int]
) -> tuple[Tensor | None, tuple[str, ...]]:
    """Boxes `(N, 4)`, xyxy in pixels, and the objects' names; None and none where there is no annotation.

    Args:
        annotation: As in `FilePair`.
        size: The image's width and height.

    Raises:
        ValueError: The annotation cannot be read, or a box has no area.
    """
    if annotation is None:
        return None, ()
    try:
        if isinstance(annotation, Path):
            rows = BOX_READERS[annotation.suffix](annotation.read_text("utf-8"), size)
        else:
            rows = [(str(row["label"]), list(map(float, row["xyxy"]))) for row in annotation]
        boxes = torch.tensor([xyxy for _, xyxy in rows], dtype=torch.float32).reshape(len(rows), 4)
    except (ElementTree.ParseError, AttributeError, TypeError, KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"The boxes of {annotation} cannot be read: {error}.") from None
    if not (boxes[:, 2:] > boxes[:, :2]).all():
        raise ValueError(f"The boxes of {annotation} must be x1 < x2 and y1 < y2; found {boxes.tolist()}.")
    return boxes, tuple(label for label, _ in rows)


def parse_voc(text: str, size: tuple[int, int]) -> list[tuple[str, list[float]]]:
    """The objects of a VOC file, whose boxes are in pixels."""
    return [
        (
            item.findtext("name", "").strip(),
            [float(item.findtext(f"bndbox/{side}", "")) for side in ("xmin", "ymin", "xmax", "ymax")],
        )
        for item in ElementTree.fromstring(text).iter("object")
    ]


def parse_yolo(text: str, size: tuple[int, int]) -> list[tuple[str, list[float]]]:
    """The objects of a YOLO file: class number, centre and size in shares of the image's. The number is the name."""
    rows = []
    for line in filter(None, map(str.strip, text.splitlines())):
        label, *numbers = line.split()
        x, y, width, height = map(float, numbers)
        left, top, right, bottom = x - width / 2, y - height / 2, x + width / 2, y + height / 2
        rows.append((label, [left * size[0], top * size[1], right * size[0], bottom * size[1]]))
    return rows


BOX_READERS: Mapping[str, Callable[[str, tuple[int, int]], list[tuple[str, list[float]]]]] = {
    ".xml": parse_voc,
    ".txt": parse_yolo,
}


def crop_boxes(
    pair: Pair, left: int, top: int, crop: int, mirror: bool, upend: bool
) -> tuple[Tensor | None, list[str]]:
    """The boxes whose centres are in a window, cut to it, and their labels."""
    if pair.boxes is None:
        return None, []
    boxes = pair.boxes - pair.boxes.new_tensor([left, top, left, top])
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    inside = ((centres >= 0) & (centres < crop)).all(dim=1)
    x1, y1, x2, y2 = boxes[inside].clamp(0, crop).unbind(dim=1)
    if mirror:
        x1, x2 = crop - x2, crop - x1
    if upend:
        y1, y2 = crop - y2, crop - y1
    labels = [label for label, keep in zip(pair.labels, inside.tolist(), strict=True) if keep]
    return torch.stack([x1, y1, x2, y2], dim=1), labels


# --- batches ---------------------------------------------------------------------------------------------------------


def mean_luminance(visible: Pixels) -> float:
    """Mean luminance of `(H, W)` or `(H, W, 3)` pixels, 0..1."""
    means = visible.reshape(visible.shape[0] * visible.shape[1], -1).mean(axis=0) / np.iinfo(visible.dtype).max
    return float(means @ LUMINANCE if len(means) == 3 else means[0])


def as_batch(
    pair: Pair, infrared: Pixels, visible: Pixels, night: bool, boxes: Tensor | None, labels: list[str]
) -> Pairs:
    """A batch of one; infrared that is stored in colour counts by its luminance."""
    light, chroma = to_ycbcr(to_tensor(visible)[None])
    return Pairs(
        infrared=luminance(to_tensor(infrared)[None]),
        visible=light,
        chroma=chroma,
        names=[pair.name],
        night=torch.tensor([night]),
        boxes=None if boxes is None else [boxes],
        labels=None if boxes is None else [labels],
    )


def collate(batches: Sequence[Pairs]) -> Pairs:
    """Join batches of one."""
    return Pairs(
        infrared=torch.cat([batch.infrared for batch in batches]),
        visible=torch.cat([batch.visible for batch in batches]),
        chroma=torch.cat([batch.chroma for batch in batches]),
        names=[name for batch in batches for name in batch.names],
        night=torch.cat([batch.night for batch in batches]),
        boxes=join([batch.boxes for batch in batches]),
        labels=join([batch.labels for batch in batches]),
    )


def join(lists: Sequence[list[Any] | None]) -> list[Any] | None:
    """One list, or None if a part is missing."""
    present = [part for part in lists if part is not None]
    return [item for part in present for item in part] if len(present) == len(lists) else None


def generate_pairs(seed: int) -> list[GeneratedPair]:
    """Synthetic pairs, by day and by night in turn, with boxes around the hot targets.

    Args:
        seed: Seed of all of them.
    """
    width, height = GENERATED_SIZE
    splits = [split for split, count in GENERATED_COUNTS.items() for _ in range(count)]
    pairs = []
    for number, split in enumerate(splits):
        random = np.random.default_rng((seed, number))
        night = number % 2 == 1
        count = int(random.integers(1, 4))
        corners = random.integers((0, height // 3), (width - 20, height - 44), (count, 2))
        sides = random.integers((8, 20), (20, 44), (count, 2))
        pairs.append(
            GeneratedPair(
                source="generated",
                name=f"synthetic_{number:02d}_{'night' if night else 'day'}",
                split=split,
                night=night,
                size=GENERATED_SIZE,
                boxes=torch.from_numpy(np.concatenate([corners, corners + sides], axis=1)).float(),
                labels=("hot",) * count,
                seed=int(random.integers(2**31)),
            )
        )
    return pairs
