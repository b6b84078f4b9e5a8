"""The datamodules' sources, splits and errors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from handwriting import write_class_folders, write_emnist
from PIL import Image
from torchvision.datasets import EMNIST

from tasks.customization.characters import CHARACTERS, MERGED_CHARACTERS, merge
from tasks.customization.data import (
    CharacterDataModule,
    Samples,
    UserDataModule,
    read_class_folders,
    read_image,
    split_samples,
    split_user,
    write_all_classes,
)
from zoo.errors import DataNotFoundError, UnknownNameError


def random_samples(per_class: list[int]) -> Samples:
    labels = torch.tensor([label for label, count in enumerate(per_class) for _ in range(count)])
    return Samples(torch.randint(0, 250, (len(labels), 28, 28), dtype=torch.uint8) // 2, labels)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data root in the layout of `characters/`, tiny."""
    torch.manual_seed(0)
    folder = tmp_path / "characters"
    folder.mkdir()
    samples = random_samples([6] * 62)
    split = np.arange(len(samples)) % 6 // 2
    names = list(CHARACTERS)
    images, labels = samples.images.numpy(), samples.labels.numpy().astype(np.uint8)
    np.savez(folder / "emnist_byclass.npz", images=images, labels=labels, split=split.astype(np.uint8), classes=names)
    shuffled = list(reversed(MERGED_CHARACTERS))
    np.savez(folder / "emnist_bymerge_extra.npz", images=images[:47], labels=np.arange(47), classes=shuffled)
    writers = np.arange(len(samples)) % 2
    np.savez(
        folder / "unipen.npz", images=images, labels=labels, writers=writers, writer_names=["ann", "bob"], classes=names
    )
    (folder / "unipen_users.json").write_text(json.dumps({"users": ["ann", "bob"]}))
    return tmp_path


def test_npz_parts_are_disjoint_merged_and_scaled(root: Path) -> None:
    module = CharacterDataModule(str(root), batch_size=500)
    module.setup()
    images, labels = next(iter(module.train_dataloader()))
    assert (
        images.shape == (124 + 47, 1, 28, 28)
        and images.dtype == torch.float32
        and 0 <= images.min() <= images.max() <= 1
    )
    assert labels.max() < 47
    assert len(module.val_set) == len(module.test_set) == 124
    assert module.train_set.samples.labels[-47:].tolist() == list(range(46, -1, -1)), "labels follow the file's classes"
    first, again = (next(iter(module.train_dataloader()))[1] for _ in range(2))
    assert torch.equal(first, again), "the order depends on seed and epoch alone"


@pytest.mark.parametrize(("split", "low", "expected"), [("byclass", 0, None), ("letters", 1, 10), ("balanced", 0, 0)])
def test_torchvision_is_upright_and_merged(tmp_path: Path, split: str, low: int, expected: int | None) -> None:
    upright = np.zeros((20, 28, 28), np.uint8)
    upright[:, 3, 10:20] = 255
    labels = (np.arange(20) + low).astype(np.uint8)
    write_emnist(tmp_path, split, upright, labels)
    module = CharacterDataModule(str(tmp_path), source="torchvision", split=split, batch_size=20)
    if split == "byclass":
        with pytest.warns(UserWarning, match="too good"):
            module.setup()
    else:
        module.setup()
    images, found = next(iter(module.test_dataloader()))
    assert torch.equal(images[0, 0], torch.from_numpy(upright[0]) / 255)
    wanted = merge(torch.arange(20)) if expected is None else torch.arange(20) + expected
    assert torch.equal(found, wanted)
    assert len(module.train_set) == 18 and len(module.val_set) == 2


def test_torchvision_without_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EMNIST, "download", lambda self: None)
    with pytest.raises(DataNotFoundError, match="EMNIST digits"):
        CharacterDataModule(str(tmp_path), source="torchvision", split="digits").setup()


def test_torchvision_keeps_its_downloads_in_the_data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(EMNIST, "__init__", lambda self, root, **options: asked.append(root))
    monkeypatch.setenv("MOE_ZOO_DATA", str(tmp_path))
    CharacterDataModule(source="torchvision").prepare_data()
    CharacterDataModule("named", source="torchvision").prepare_data()
    monkeypatch.delenv("MOE_ZOO_DATA")
    CharacterDataModule(source="torchvision").prepare_data()
    assert asked == [str(tmp_path), "named", "."]


def test_generated_writers_do_not_overlap() -> None:
    module = CharacterDataModule(source="generated", writers=5, samples_per_class=1)
    module.setup()
    assert [len(part) for part in (module.train_set, module.val_set, module.test_set)] == [186, 62, 62]


def test_stratified_split_60_20_20_and_the_rule_for_small_classes() -> None:
    samples = random_samples([10, 20, 5, 3, 1, 1])
    parts = split_samples(samples, seed=0)
    assert sum(len(part) for part in parts) == 40
    for label, count in ((0, 10), (1, 20), (2, 5)):
        assert [int((part.labels == label).sum()) for part in parts] == [0.6 * count, 0.2 * count, 0.2 * count]
    small = [int((part.labels >= 3).sum()) for part in parts]
    assert small == [3, 1, 1], "classes of fewer than five are split together"
    pixels = torch.cat([part.images for part in parts]).flatten(1)
    assert len(pixels.unique(dim=0)) == 40, "no sample is in two parts"
    again = split_samples(samples, seed=0)
    assert all(torch.equal(a.images, b.images) for a, b in zip(parts, again, strict=True))
    assert not torch.equal(split_samples(samples, seed=1)[0].images, parts[0].images)


def test_fewer_samples_leave_the_test_part_alone() -> None:
    samples = random_samples([30, 30])
    everything, few = split_user("u", samples, 0), split_user("u", samples, 0, max_samples=12)
    assert torch.equal(everything.test.images, few.test.images)
    assert (len(few.train), len(few.val)) == (9, 3)


@pytest.mark.parametrize(
    ("per_class", "words"),
    [([2, 1], "has 3 samples; at least 5"), ([10], "only digit_0"), ([5] * 63, r"labels \[62\]; allowed are 0..61")],
)
def test_users_that_cannot_be_customised(per_class: list[int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        split_user("u", random_samples(per_class), 0)


def test_unipen_users_and_unknown_names(root: Path) -> None:
    module = UserDataModule(str(root), seeds=[0, 1])
    module.setup()
    assert [(user.user, user.seed) for user in module.users] == [("ann", 0), ("bob", 0), ("ann", 1), ("bob", 1)]
    with pytest.raises(UnknownNameError, match="Did you mean 'ann'"):
        UserDataModule(str(root), user="anne").setup()
    with pytest.raises(ValueError, match=r"one user at a time, found ann \(seed 0\), bob"):
        module.train_dataloader()


def test_users_from_folders_round_trip(tmp_path: Path) -> None:
    samples = random_samples([5, 5, 0, 5])
    write_class_folders(tmp_path / "me", samples)
    module = UserDataModule(source="folder", folder=str(tmp_path), generic="none")
    module.setup()
    (user,) = module.users
    assert user.user == "me" and len(user.train) == 9
    found = read_class_folders(tmp_path / "me")
    assert torch.equal(found.images, samples.images) and torch.equal(found.labels, samples.labels)
    with pytest.raises(UnknownNameError, match="Did you mean 'me'"):
        UserDataModule(source="folder", folder=str(tmp_path), user="mee").setup()
    with pytest.raises(DataNotFoundError, match=r"--data\.folder"):
        UserDataModule(source="folder", folder=str(tmp_path / "nowhere")).setup()


def test_bad_images_and_folders(tmp_path: Path) -> None:
    for name, pixels, words in (
        ("large.png", np.zeros((32, 28), np.uint8), "28 x 32 pixels; expected 28 x 28"),
        ("inverted.png", np.full((28, 28), 255, np.uint8), "black on white"),
    ):
        Image.fromarray(pixels).save(tmp_path / name)
        with pytest.raises(ValueError, match=words):
            read_image(tmp_path / name)
    ink = np.zeros((28, 28, 4), np.uint8)
    ink[8:20, 8:20, 3] = 255
    Image.fromarray(ink).save(tmp_path / "transparent.png")
    with pytest.raises(ValueError, match="transparent, and its ink is black"):
        read_image(tmp_path / "transparent.png")
    ink[..., :3] = 255
    Image.fromarray(ink).save(tmp_path / "white.png")
    assert np.array_equal(read_image(tmp_path / "white.png"), ink[..., 3])
    Image.fromarray(np.zeros((28, 28), np.uint8)).save(tmp_path / "blank.png")
    with pytest.raises(ValueError, match="holds no ink"):
        read_image(tmp_path / "blank.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    with pytest.raises(ValueError, match="cannot be read as an image"):
        read_image(tmp_path / "broken.png")
    with pytest.raises(DataNotFoundError, match="any image"):
        read_class_folders(tmp_path)
    (tmp_path / "letter_a").mkdir()
    with pytest.raises(ValueError, match="'letter_a' names no class"):
        read_class_folders(tmp_path)


def test_class_folders_without_a_user_folder_are_recognised(tmp_path: Path) -> None:
    write_class_folders(tmp_path, random_samples([5, 5]))
    with pytest.raises(DataNotFoundError, match="digit_0 names a class: put the class folders into"):
        UserDataModule(source="folder", folder=str(tmp_path)).setup()
    (tmp_path / "nobody").mkdir()
    with pytest.raises(DataNotFoundError, match="any user"):
        UserDataModule(source="folder", folder=str(tmp_path / "nobody")).setup()


def test_arguments_of_another_source_are_refused() -> None:
    for arguments, words in (
        ({"folder": "DIR"}, "folder='DIR' has no effect on source='npz': it is for source='folder'"),
        ({"split": "digits"}, "split='digits' has no effect on source='npz': it is for source='torchvision'"),
        ({"source": "folder", "writers": 5}, "writers=5 has no effect on source='folder'"),
        ({"source": "torchvision", "samples_per_class": 1}, "samples_per_class=1 has no effect"),
    ):
        with pytest.raises(ValueError, match=words):
            CharacterDataModule(**arguments)
    CharacterDataModule(split="byclass", writers=20)
    for source in ("unipen", "synthetic"):
        with pytest.raises(ValueError, match=f"folder='DIR' has no effect on source='{source}'"):
            UserDataModule(source=source, folder="DIR")
    for module in (CharacterDataModule, UserDataModule):
        with pytest.raises(UnknownNameError, match=r"Unknown source of characters 'folders'\. Did you mean 'folder'"):
            module(source="folders")


@pytest.mark.parametrize("generic", ["npz", "generated"])
def test_generic_images_of_either_source(root: Path, generic: str) -> None:
    module = UserDataModule(str(root), user="ann", generic=generic)
    module.setup()
    (images, _), *_ = [next(iter(loader)) for loader in module.test_dataloader()]
    assert len(images) == 124


def test_missing_root_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(DataNotFoundError, match=r"emnist_byclass\.npz"):
        CharacterDataModule(str(tmp_path)).setup()


def test_synthetic_users_are_marked() -> None:
    module = UserDataModule(source="synthetic", user="synthetic-3", generic="none")
    module.setup()
    assert module.users[0].synthetic and len(write_all_classes(1, 1)) == 62
