"""What the datamodules share: the data root, "not found" in one voice, split checks, loaders that can be resumed."""

import os
from collections.abc import Hashable, Iterable, Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from zoo.errors import DataNotFoundError

if TYPE_CHECKING:
    import pandas as pd

ENVIRONMENT_VARIABLE = "MOE_ZOO_DATA"
HOW_TO_NAME_THE_ROOT = (
    f"Name the folder that holds characters/, fusion/, ... with --data.root DIR or the variable {ENVIRONMENT_VARIABLE}."
)


def data_root(root: str | Path | None = None) -> Path:
    """The folder that holds `characters/`, `fusion/`, ...

    Args:
        root: That folder; if none is given, the variable `MOE_ZOO_DATA` names it.

    Raises:
        DataNotFoundError: Neither names a folder that exists.
    """
    named = root or os.environ.get(ENVIRONMENT_VARIABLE)
    if named and Path(named).is_dir():
        return Path(named)
    raise DataNotFoundError("the data folder", [named] if named else [], HOW_TO_NAME_THE_ROOT)


def find(root: str | Path | None, relative: str, how_to_get: str) -> Path:
    """A file or folder below the data root.

    Args:
        root: The data root, as for `data_root`.
        relative: The path below it.
        how_to_get: A sentence for the error: where this data comes from.

    Raises:
        DataNotFoundError: It is not there.
    """
    path = data_root(root) / relative
    if not path.exists():
        raise DataNotFoundError(relative, [path], how_to_get)
    return path


def check_fields(table: "pd.DataFrame", path: str | Path) -> None:
    """Refuse a CSV file whose rows have more fields than its header: pandas takes the first of them for an index.

    Args:
        table: As `pandas.read_csv` gives it, without `index_col`.
        path: The file.

    Raises:
        ValueError: Its rows have more.
    """
    if type(table.index).__name__ != "RangeIndex":
        raise ValueError(
            f"{path}: the rows have more fields than the header has names. Put texts with commas in double quotes."
        )


def check_disjoint(splits: Mapping[str, Iterable[Hashable]]) -> None:
    """Refuse splits that share samples, whatever identifies a sample: an index, a file, a document, a writer.

    Args:
        splits: Identifiers by the split's name.

    Raises:
        ValueError: Two splits overlap.
    """
    sets = {name: set(identifiers) for name, identifiers in splits.items()}
    for first, second in combinations(sets, 2):
        if shared := sets[first] & sets[second]:
            examples = ", ".join(sorted(map(str, shared))[:3])
            raise ValueError(
                f"The splits {first!r} and {second!r} share {len(shared)} samples, e.g. {examples}: "
                "scores would be too good. Split again so that each sample is in one of them."
            )


def epoch_seed(seed: int, epoch: int) -> int:
    """A seed of its own for every epoch: what an epoch draws depends on these two numbers alone.

    Args:
        seed: The run's seed.
        epoch: The epoch, from 0.
    """
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])


class EpochSampler(Sampler[int]):
    """A permutation per epoch that depends on the seed and the epoch alone, so that a resumed run sees it again.

    Lightning calls `set_epoch` at the start of every epoch.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose permutation comes next.

        Args:
            epoch: The epoch, from 0.
        """
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, self.epoch))
        yield from torch.randperm(self.size, generator=generator).tolist()


class LateLoader(DataLoader[Any]):
    """A DataLoader that begins with its first batch rather than with `iter()`.

    Lightning calls `iter()` before it has restored a checkpoint and before the epoch's seeds are set; worker processes
    would then draw the first batches of the wrong epoch.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from super().__iter__()


class ZooDataModule(pl.LightningDataModule):
    """Base of the datamodules: a subclass fills `train_set`, `val_set`, `test_set` or `predict_set` in `setup`."""

    train_set: Dataset[Any] | None = None
    val_set: Dataset[Any] | None = None
    test_set: Dataset[Any] | None = None
    predict_set: Dataset[Any] | None = None

    def __init__(self, batch_size: int = 32, num_workers: int = 0, seed: int = 0) -> None:
        """Store what every loader needs.

        Args:
            batch_size: Samples per batch.
            num_workers: Processes that load data; 0 loads in the main one.
            seed: Seed of the training order.
        """
        super().__init__()
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of `train_set`, in an order that depends on the seed and the epoch alone."""
        return self.loader(self.require("train_set"), shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Batches of `val_set`."""
        return self.loader(self.require("val_set"))

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of `test_set`."""
        return self.loader(self.require("test_set"))

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches of `predict_set`, or of `test_set` where there is no other."""
        return self.loader(self.require("predict_set", "test_set"))

    def loader(self, dataset: Dataset[Any], shuffle: bool = False, **options: Any) -> DataLoader[Any]:
        """A loader over a dataset; the worker processes' randomness depends on the seed and the epoch alone.

        Args:
            dataset: A dataset of known length.
            shuffle: Whether to permute it anew in every epoch.
            options: Further arguments of `DataLoader`, e.g. `collate_fn`, or a `sampler` in place of that.
        """
        if shuffle:
            options.setdefault("sampler", EpochSampler(len(dataset), self.seed))  # type: ignore[arg-type]
        return LateLoader(
            dataset,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            generator=torch.Generator().manual_seed(self.seed),
            **options,
        )

    def require(self, *names: str) -> Dataset[Any]:
        """The first of the named datasets that `setup` has filled.

        Args:
            names: Attributes, in order of preference.

        Raises:
            ValueError: None of them is filled.
        """
        for name in names:
            dataset: Dataset[Any] | None = getattr(self, name)
            if dataset is not None:
                return dataset
        raise ValueError(
            f"{type(self).__name__}.setup() filled none of {', '.join(names)}: this data has no such part."
        )
