"""Data roots, split checks, and loaders whose order depends on seed and epoch alone."""

import pytest
import torch
from torch.utils.data import TensorDataset

from zoo.data import EpochSampler, ZooDataModule, check_disjoint, check_fields, data_root, epoch_seed, find
from zoo.errors import DataNotFoundError


def test_the_argument_wins_over_the_environment(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    monkeypatch.setenv("MOE_ZOO_DATA", str(tmp_path))
    assert data_root() == tmp_path
    assert data_root(str(tmp_path / "a")) == tmp_path / "a"


@pytest.mark.parametrize(("root", "words"), [(None, r"No folder was named\."), ("nowhere", r"Looked in: nowhere\.")])
def test_missing_root(root, words, monkeypatch):
    monkeypatch.delenv("MOE_ZOO_DATA", raising=False)
    with pytest.raises(DataNotFoundError, match=rf"{words}.*MOE_ZOO_DATA"):
        data_root(root)


def test_find(tmp_path):
    (tmp_path / "users.csv").touch()
    assert find(tmp_path, "users.csv", "") == tmp_path / "users.csv"
    with pytest.raises(DataNotFoundError, match=r"Could not find letters.npz. .*letters.npz. Ask the archive."):
        find(tmp_path, "letters.npz", "Ask the archive.")


def test_disjoint_splits():
    check_disjoint({"train": range(5), "val": range(5, 7), "test": []})
    with pytest.raises(ValueError, match=r"'train' and 'test' share 2 samples, e.g. 3, 4:"):
        check_disjoint({"train": range(5), "val": [9], "test": [3, 4]})


def test_an_epoch_has_its_own_order_and_keeps_it():
    def order(seed, epoch):
        sampler = EpochSampler(50, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 3) == order(0, 3)
    assert sorted(order(0, 3)) == list(range(50))
    assert len({tuple(order(seed, epoch)) for seed in range(2) for epoch in range(3)}) == 6
    assert len({epoch_seed(seed, epoch) for seed in range(20) for epoch in range(20)}) == 400


def test_loaders():
    data = Numbers(batch_size=4, seed=1)
    assert [len(batch[0]) for batch in data.train_dataloader()] == [4, 4, 2]
    assert torch.cat([batch[0] for batch in data.val_dataloader()]).tolist() == list(range(10))
    first = torch.cat([batch[0] for batch in data.train_dataloader()])
    torch.rand(3)
    assert torch.equal(first, torch.cat([batch[0] for batch in data.train_dataloader()]))


def test_a_missing_part_is_named():
    data = Numbers()
    data.val_set = None
    with pytest.raises(ValueError, match=r"Numbers.setup\(\) filled none of val_set"):
        data.val_dataloader()
    with pytest.raises(ValueError, match="none of predict_set, test_set"):
        data.predict_dataloader()
    data.test_set = data.train_set
    assert len(data.predict_dataloader().dataset) == 10


class Numbers(ZooDataModule):
    train_set = val_set = TensorDataset(torch.arange(10))


def test_rows_with_more_fields_than_the_header_are_refused(tmp_path):
    """Pandas would take the first field of each for an index, and all others one column too far left."""
    import pandas as pd

    path = tmp_path / "own.csv"
    path.write_text("prompt,answer\nHow do I sleep, please?,Go to bed.\n")
    with pytest.raises(ValueError, match=r"own\.csv: the rows have more fields than the header.*double quotes"):
        check_fields(pd.read_csv(path), path)
    path.write_text('prompt,answer\n"How do I sleep, please?",Go to bed.\n')
    check_fields(pd.read_csv(path), path)
