"""The layouts, parts, windows and errors of the pairs."""

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from tasks.fusion.data import (
    SETS,
    FusionDataModule,
    PairDataset,
    frame_order,
    generate_pairs,
    is_test_frame,
    is_validation_frame,
    split_validation,
)
from zoo.data import ENVIRONMENT_VARIABLE
from zoo.errors import DataNotFoundError, UnknownNameError

SIZE = (24, 20)
real_data = pytest.mark.skipif(
    not os.environ.get(ENVIRONMENT_VARIABLE), reason=f"{ENVIRONMENT_VARIABLE} names no data folder"
)


def write_pair(infrared: Path, visible: Path, number: int = 0, size: tuple[int, int] = SIZE) -> None:
    """Infrared is grey and the negative of the visible image's red channel, so that broken pairs show."""
    width, height = size
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3)).astype(np.uint8)
    for path, image in ((infrared, 255 - pixels[..., 0]), (visible, pixels)):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def write_folders(folder: Path, infrared: str, visible: str, names: Sequence[str], suffix: str = ".png") -> None:
    for number, name in enumerate(names):
        write_pair(folder / infrared / f"{name}{suffix}", folder / visible / f"{name}{suffix}", number)


def numbered(count: int, first: int = 0) -> list[str]:
    return [f"{number:05d}" for number in range(first, first + count)]


def write_voc(path: Path, boxes: Sequence[tuple[str, tuple[int, int, int, int]]]) -> None:
    items = "".join(
        f"<object><name>{label}</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax></bndbox>"
        "</object>"
        for label, (a, b, c, d) in boxes
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"<annotation><size><width>24</width></size>{items}</annotation>")


def parts(module: FusionDataModule) -> dict[str, list[str]]:
    return {part: [pair.name for pair in pairs] for part, pairs in module.pairs_by_part().items()}


def set_up(*stages: str | None, **options: object) -> FusionDataModule:
    module = FusionDataModule(**{"crop": 16, "crops_per_image": 2, "batch_size": 4, **options})
    for stage in stages or (None,):
        module.setup(stage)
    return module


# --- layouts ---------------------------------------------------------------------------------------------------------


def test_official_splits_of_msrs_and_their_time(tmp_path: Path) -> None:
    folder = tmp_path / "fusion" / "msrs"
    write_folders(folder, "train/ir", "train/vi", [f"{number:05d}{'DN'[number % 2]}" for number in range(12)])
    write_folders(folder, "test/ir", "test/vi", ["00090D", "00091N"])
    module = set_up("fit", "test", root=str(tmp_path), sources=["msrs"], test_source="msrs")
    assert parts(module)["test"] == ["00090D", "00091N"]
    assert len(parts(module)["train"]) == 10 and parts(module)["val"] == ["00008D", "00009N"]
    assert [batch.night.tolist() for batch in module.test_dataloader()] == [[False], [True]]


def test_official_llvip_with_boxes(tmp_path: Path) -> None:
    folder = tmp_path / "fusion" / "llvip"
    write_folders(folder, "infrared/train", "visible/train", numbered(10), ".jpg")
    write_folders(folder, "infrared/test", "visible/test", numbered(2, 90), ".jpg")
    for name in [*numbered(10), "00090"]:
        write_voc(folder / "Annotations" / f"{name}.xml", [("person", (2, 3, 8, 19)), ("person", (10, 0, 24, 20))])
    module = set_up("fit", "test", root=str(tmp_path), sources=["llvip"], test_source="llvip")
    annotated, not_annotated = module.test_dataloader()
    assert annotated.names == ["00090"] and annotated.labels == [["person", "person"]]
    assert annotated.boxes is not None
    assert annotated.boxes[0].tolist() == [[2, 3, 8, 19], [10, 0, 24, 20]]
    assert not_annotated.boxes is None and not_annotated.labels is None
    assert all(batch.boxes is not None for batch in module.train_dataloader())


def test_official_roadscene_is_divided_by_blocks(tmp_path: Path) -> None:
    names = [f"FLIR_{number:05d}" for number in range(0, 600, 10)]
    write_folders(tmp_path / "fusion" / "roadscene", "cropinfrared", "crop_LR_visible", names, ".jpg")
    module = set_up("fit", "test", root=str(tmp_path), sources=["roadscene"])
    found = parts(module)
    assert found["test"] == names[44:55]
    learned = names[:44] + names[55:]
    assert found["val"] == learned[20:25] and found["train"] == learned[:20] + learned[25:]


def test_m3fd_and_its_fusion_part(tmp_path: Path) -> None:
    write_folders(tmp_path / "fusion" / "m3fd", "Ir", "Vis", numbered(50))
    for name in numbered(50):
        write_voc(tmp_path / "fusion" / "m3fd" / "Annotation" / f"{name}.xml", [("Car", (1, 2, 3, 4))])
    write_folders(tmp_path / "fusion" / "m3fd_fusion", "ir", "vis", numbered(3))
    module = set_up("fit", "test", root=str(tmp_path), sources=["m3fd"], test_source="m3fd")
    assert parts(module)["test"] == numbered(6, 44)
    assert next(iter(module.test_dataloader())).labels == [["Car"]]
    fusion = set_up("test", root=str(tmp_path), test_source="m3fd_fusion")
    assert parts(fusion)["test"] == numbered(3)


def test_tno_is_for_testing_alone(tmp_path: Path) -> None:
    write_folders(tmp_path / "fusion" / "tno", "ir", "vi", ["Kaptein_1123", "Bunker"], ".bmp")
    module = set_up("test", root=str(tmp_path), test_source="tno")
    assert parts(module) == {"test": ["Bunker", "Kaptein_1123"]}
    with pytest.raises(ValueError, match="tno has 0 training pairs; at least 5"):
        set_up("fit", root=str(tmp_path), sources=["tno"])


def test_yolo_boxes_of_msrs_detection(tmp_path: Path) -> None:
    folder = tmp_path / "fusion" / "msrs" / "detection"
    write_folders(folder, "ir", "vi", ["1", "2", "10"])
    (folder / "labels").mkdir()
    (folder / "labels" / "2.txt").write_text("0 0.5 0.5 0.25 0.5\n2 0.25 0.1 0.5 0.2\n\n")
    module = set_up("test", folder=str(folder))
    assert parts(module)["test"] == ["1", "2", "10"], "numbers in names count as numbers"
    (batch,) = (batch for batch in module.test_dataloader() if batch.boxes)
    assert batch.names == ["2"] and batch.labels == [["0", "2"]]
    assert torch.allclose(batch.boxes[0], torch.tensor([[9.0, 5, 15, 15], [0, 0, 12, 4]]))


def write_table(folder: Path, rows: Sequence[dict[str, str]]) -> None:
    with (folder / "pairs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_the_table_of_a_set_says_split_and_time(tmp_path: Path) -> None:
    folder = tmp_path / "fusion" / "llvip_mini"
    names = numbered(9)
    write_folders(folder, "ir", "vi", names)
    rows = [
        {"name": name, "ir": f"ir/{name}.png", "vi": f"vi/{name}.png", "split": "test" if i > 6 else "train"}
        for i, name in enumerate(names)
    ]
    write_table(folder, [{**row, "time": ("night", "day", "")[i % 3]} for i, row in enumerate(rows)])
    (folder / "boxes.json").write_text(json.dumps({"00007": [{"label": "person", "xyxy": [1, 2, 3, 4]}], "00008": []}))
    module = set_up("fit", "test", root=str(tmp_path), sources=["llvip_mini"], test_source="llvip_mini")
    assert parts(module) == {"train": [*numbered(4), *numbered(2, 5)], "val": ["00004"], "test": ["00007", "00008"]}
    seventh, eighth = module.test_dataloader()
    assert (seventh.boxes[0].tolist(), seventh.labels) == ([[1, 2, 3, 4]], [["person"]])
    assert eighth.boxes[0].shape == (0, 4) and eighth.labels == [[]], "looked at, and nobody there"
    assert [pair.night for pair in module.train_set.pairs] == [True, False, None, True, None, True]


def test_a_table_may_name_validation_pairs_and_must_be_right(tmp_path: Path) -> None:
    names = numbered(4)
    write_folders(tmp_path, "thermal", "colour", names)
    rows = [{"name": name, "ir": f"thermal/{name}.png", "vi": f"colour/{name}.png"} for name in names]
    write_table(tmp_path, [{**row, "split": "val" if i == 1 else "train"} for i, row in enumerate(rows)])
    module = set_up("fit", folder=str(tmp_path))
    assert parts(module) == {"train": [names[0], *names[2:]], "val": names[1:2]}
    with pytest.raises(ValueError, match="own has no test pairs, only train, val"):
        module.setup("test")
    write_table(tmp_path, [{**row, "split": "trian"} for row in rows])
    with pytest.raises(UnknownNameError, match="Did you mean 'train'"):
        set_up("fit", folder=str(tmp_path))
    for time in ("Night", "dusk"):
        write_table(tmp_path, [{**row, "time": time} for row in rows])
        with pytest.raises(UnknownNameError, match=rf"Unknown time in .*pairs\.csv '{time}'.* Allowed: day, night"):
            set_up("fit", folder=str(tmp_path))
    write_table(tmp_path, rows)
    with (tmp_path / "pairs.csv").open("a") as file:
        file.write("00004,thermal/00004.png\n")
    with pytest.raises(ValueError, match=r"pair 5: found name=00004, ir=thermal/00004\.png, vi=\. Fill in"):
        set_up("predict", folder=str(tmp_path))
    write_table(tmp_path, [rows[0], rows[0]])
    with pytest.raises(ValueError, match=r"1 names of pairs occur twice in .*: 00000\."):
        set_up("fit", folder=str(tmp_path))
    write_table(tmp_path, [{"name": "00000", "ir": "thermal/00000.png"}])
    with pytest.raises(ValueError, match=r"lacks the columns vi\."):
        set_up("fit", folder=str(tmp_path))
    write_table(tmp_path, [{**rows[0], "vi": "colour/absent.png"}])
    with pytest.raises(ValueError, match=r"1 pairs cannot be used: .*absent.png"):
        set_up("predict", folder=str(tmp_path))


@pytest.mark.parametrize("source", SETS)
def test_absent_sets_say_where_to_get_them(tmp_path: Path, source: str) -> None:
    with pytest.raises(DataNotFoundError, match=SETS[source].how_to_get.split()[0]):
        set_up("test", root=str(tmp_path), test_source=source)
    (tmp_path / "fusion" / SETS[source].folder).mkdir(parents=True)
    with pytest.raises(DataNotFoundError, match=r"pairs\.csv, or one of: train/ir/ and train/vi/"):
        set_up("test", root=str(tmp_path), test_source=source)


def test_unknown_sets_and_no_sets() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'roadscene'"):
        set_up("fit", sources=["roadscenes"])
    with pytest.raises(ValueError, match="names no set"):
        set_up("fit", sources=[])


@real_data
def test_the_rule_for_official_roadscene_gives_the_split_of_the_development_data() -> None:
    folder = Path(os.environ[ENVIRONMENT_VARIABLE]) / "fusion" / "roadscene"
    with (folder / "pairs.csv").open() as file:
        split = {row["name"]: row["split"] for row in csv.DictReader(file)}
    found = {
        name: "test" if is_test_frame(i, name) else "train" for i, name in enumerate(sorted(split, key=frame_order))
    }
    assert len(found) == 221 and found == split


@real_data
def test_the_development_data() -> None:
    module = FusionDataModule()
    module.setup("fit")
    module.setup("test")
    assert [len(pairs) for pairs in module.pairs_by_part().values()] == [181, 25, 45]
    assert {pair.source for pair in module.val_set.pairs} == {"roadscene", "msrs"}
    assert module.describe() == "156 pairs of roadscene, 25 pairs of msrs; 25 pairs held out for validation"


# --- two folders of one's own ----------------------------------------------------------------------------------------


def test_two_folders_pair_by_stem_whatever_the_suffix(tmp_path: Path) -> None:
    write_pair(tmp_path / "thermal" / "b.png", tmp_path / "colour" / "b.jpg", 1)
    write_pair(tmp_path / "thermal" / "a.tif", tmp_path / "colour" / "a.PNG", 2)
    (tmp_path / "colour" / "Thumbs.db").touch()
    (tmp_path / "colour" / ".a.png").touch()
    module = set_up("predict", ir=str(tmp_path / "thermal"), vi=str(tmp_path / "colour"))
    batches = list(module.predict_dataloader())
    assert [batch.names for batch in batches] == [["a"], ["b"]]
    assert module.source_folders() == [tmp_path / "colour", tmp_path / "thermal"]
    assert batches[0].infrared.shape == batches[0].visible.shape == (1, 1, 20, 24)


def test_own_pairs_are_all_tested_or_learned_from_but_not_both(tmp_path: Path) -> None:
    write_folders(tmp_path, "ir", "vi", numbered(10))
    found = parts(set_up("fit", folder=str(tmp_path)))
    assert len(found["train"]) == 9 and found["val"] == ["00004"]
    assert parts(set_up("test", folder=str(tmp_path))) == {"test": numbered(10)}
    with pytest.raises(ValueError, match="'train' and 'test' share 9 samples"):
        set_up("fit", "test", folder=str(tmp_path))


def test_sixteen_bit_infrared_grey_visible_and_coloured_infrared(tmp_path: Path) -> None:
    deep = np.arange(20 * 24, dtype=np.uint16).reshape(20, 24) * 100
    grey = (deep // 257).astype(np.uint8)
    for folder in ("ir", "vi"):
        (tmp_path / folder).mkdir()
    Image.fromarray(deep).save(tmp_path / "ir" / "deep.png")
    Image.fromarray(grey).save(tmp_path / "vi" / "deep.png")
    Image.fromarray(np.stack([grey] * 3, -1)).save(tmp_path / "ir" / "grey.png")
    Image.fromarray(deep).save(tmp_path / "vi" / "grey.tif")
    first, second = set_up("predict", folder=str(tmp_path)).predict_dataloader()
    assert np.allclose(first.infrared[0, 0].numpy(), deep / 65535, atol=1e-6)
    assert np.allclose(first.visible[0, 0].numpy(), grey / 255, atol=1e-6) and not first.chroma.any()
    assert first.chroma.shape == (1, 2, 20, 24)
    assert np.allclose(second.infrared[0, 0].numpy(), grey / 255, atol=1e-6)
    assert np.allclose(second.visible[0, 0].numpy(), deep / 65535, atol=1e-6)


def test_brightness_tells_night_where_nothing_else_does(tmp_path: Path) -> None:
    for name, level in (("bright", 90), ("dark", 60)):
        for folder in ("ir", "vi"):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.new("RGB", SIZE, (level, level, level)).save(tmp_path / folder / f"{name}.png")
    found = {batch.names[0]: batch.night.tolist() for batch in set_up("test", folder=str(tmp_path)).test_dataloader()}
    assert found == {"bright": [False], "dark": [True]}


# --- errors ----------------------------------------------------------------------------------------------------------


def test_files_without_a_partner_are_listed(tmp_path: Path) -> None:
    write_folders(tmp_path, "ir", "vi", numbered(12))
    for name in numbered(11):
        (tmp_path / "vi" / f"{name}.png").unlink()
    (tmp_path / "ir" / "00011.png").unlink()
    with pytest.raises(ValueError, match="12 files have no partner") as error:
        set_up("predict", folder=str(tmp_path))
    words = str(error.value)
    assert words.count(".png") == 10 and "and 2 more" in words and "same stem" in words
    assert str(tmp_path / "ir" / "00000.png") in words


def test_sizes_and_unreadable_files_are_listed_together(tmp_path: Path) -> None:
    write_folders(tmp_path, "ir", "vi", numbered(4))
    Image.new("L", (12, 20)).save(tmp_path / "ir" / "00001.png")
    (tmp_path / "vi" / "00003.png").write_text("no image")
    with pytest.raises(ValueError, match="2 pairs cannot be used") as error:
        set_up("predict", folder=str(tmp_path))
    assert "00001: visible 24 x 20, infrared 12 x 20" in str(error.value)
    assert f"{tmp_path / 'vi' / '00003.png'} cannot be read" in str(error.value)


def test_folders_that_cannot_be_paired(tmp_path: Path) -> None:
    write_folders(tmp_path, "ir", "vi", numbered(2))
    infrared, visible = str(tmp_path / "ir"), str(tmp_path / "vi")
    with pytest.raises(ValueError, match="are the same"):
        set_up("predict", ir=infrared, vi=str(tmp_path / "vi" / ".." / "ir"))
    for options in ({"ir": infrared}, {"vi": visible}, {"ir": infrared, "vi": visible, "folder": str(tmp_path)}):
        with pytest.raises(ValueError, match=r"name both --data\.ir DIR and --data\.vi DIR"):
            set_up("predict", **options)
    with pytest.raises(DataNotFoundError, match=r"Name two folders with --data\.ir"):
        set_up("predict", ir=infrared, vi=str(tmp_path / "nowhere"))
    with pytest.raises(DataNotFoundError, match=r"Name it with --data\.folder"):
        set_up("predict", folder=str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataNotFoundError, match=r"any image.*\.png, \.jpg"):
        set_up("predict", ir=str(tmp_path / "empty"), vi=visible)
    Image.new("L", SIZE).save(tmp_path / "vi" / "00001.jpg")
    with pytest.raises(ValueError, match=r"1 files in .* share their stem with another: 00001\.jpg"):
        set_up("predict", ir=infrared, vi=visible)


def test_windows_larger_than_an_image(tmp_path: Path) -> None:
    write_folders(tmp_path, "ir", "vi", numbered(6))
    with pytest.raises(ValueError, match=r"5 pairs are smaller than --data\.crop 22: 00000: 24 x 20; .* at most .* 20"):
        set_up("fit", folder=str(tmp_path), crop=22)


def test_sides_that_the_losses_cannot_read(tmp_path: Path) -> None:
    write_folders(tmp_path, "ir", "vi", numbered(6))
    with pytest.raises(ValueError, match=r"--data\.crop 10: the losses need sides of at least 11"):
        set_up("fit", folder=str(tmp_path), crop=10)
    # The validation pair.
    write_pair(tmp_path / "ir" / "00004.png", tmp_path / "vi" / "00004.png", size=(24, 10))
    with pytest.raises(ValueError, match=r"1 pairs have a side below 11 pixels, .*: 00004: 24 x 10\."):
        set_up("fit", folder=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("00000.xml", "<annotation><object>", r"00000\.xml cannot be read"),
        ("00000.xml", "<annotation><object><name>a</name></object></annotation>", r"00000\.xml cannot be read"),
        ("00000.txt", "0 0.5 0.5 0.25", r"00000\.txt cannot be read"),
        ("00000.txt", "0 0.5 0.5 0.25 0", "must be x1 < x2 and y1 < y2"),
    ],
)
def test_boxes_that_cannot_be_read(tmp_path: Path, name: str, text: str, words: str) -> None:
    write_folders(tmp_path, "ir", "vi", numbered(1))
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / name).write_text(text)
    with pytest.raises(ValueError, match=words):
        set_up("test", folder=str(tmp_path))


# --- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [5, 6, 12, 30, 41, 64, 176, 1083, 12025])
def test_validation_blocks_are_contiguous_and_about_an_eighth(count: int) -> None:
    held = np.array([is_validation_frame(index, count) for index in range(count)])
    assert 0.08 <= held.mean() <= 0.2
    edges = np.flatnonzero(np.diff(np.pad(held.astype(int), 1)))
    lengths = edges[1::2] - edges[::2]
    assert len(lengths) <= 4 and (lengths[:-1] == lengths[0]).all() and lengths[-1] <= lengths[0]


def test_too_few_pairs_to_learn_and_validate() -> None:
    with pytest.raises(ValueError, match="generated has 4 training pairs; at least 5"):
        split_validation(generate_pairs(0)[:4])


# --- generated pairs, windows, batches -------------------------------------------------------------------------------


def test_generated_pairs_need_nothing_and_hide_targets_from_the_visible_band() -> None:
    module = set_up(sources=["generated"], test_source="generated")
    assert [len(pairs) for pairs in module.pairs_by_part().values()] == [20, 4, 8]
    assert "generated (synthetic)" in module.describe() and not module.source_folders()
    batches = list(module.test_dataloader())
    assert all("synthetic" in batch.names[0] for batch in batches)
    assert [batch.night.item() for batch in batches] == [False, True] * 4
    for batch in batches:
        assert (batch.visible.mean() < 0.3) == batch.night.item()
        for left, top, right, bottom in batch.boxes[0].long().tolist():
            middle = (..., (top + bottom) // 2, (left + right) // 2)
            assert batch.infrared[middle] > 0.75 > batch.infrared.mean() + 0.3
    again = set_up("test", test_source="generated").test_set[3]
    assert torch.equal(again.visible, batches[3].visible)
    other = set_up("test", test_source="generated", seed=1).test_set[3]
    assert not torch.equal(other.visible, batches[3].visible)


@pytest.fixture
def own(tmp_path: Path) -> str:
    write_folders(tmp_path, "ir", "vi", numbered(8))
    for name in numbered(8):
        write_voc(tmp_path / "labels" / f"{name}.xml", [("left", (2, 4, 6, 8)), ("right", (15, 5, 23, 19))])
    return str(tmp_path)


def test_windows_never_break_a_pair(own: str) -> None:
    module = set_up("fit", folder=own, crops_per_image=20)
    whole = {pair.name: module.train_set.whole[i] for i, pair in enumerate(module.train_set.pairs)}
    seen = set()
    for batch in module.train_dataloader():
        assert batch.infrared.shape == batch.visible.shape == (len(batch), 1, 16, 16)
        red = batch.visible + 1.402 * batch.chroma[:, 1:]
        assert torch.allclose(batch.infrared, 1 - red, atol=1e-5), "infrared is the negative of red, pixel for pixel"
        for place, name in enumerate(batch.names):
            windows = whole[name].infrared[0, 0].unfold(0, 16, 1).unfold(1, 16, 1)
            turned = {
                (mirror, upend): batch.infrared[place, 0].flip([d for d, on in ((0, upend), (1, mirror)) if on])
                for mirror in (False, True)
                for upend in (False, True)
            }
            (found,) = (
                (int(top), int(left), *turn)
                for turn, window in turned.items()
                for top, left in (windows == window).all(-1).all(-1).nonzero()
            )
            seen.add(found)
    tops, lefts, mirrors, upends = (set(values) for values in zip(*seen, strict=True))
    assert tops == set(range(5)) and lefts == set(range(9)) and mirrors == upends == {False, True}


def test_boxes_move_with_their_window(own: str, tmp_path: Path) -> None:
    for name in numbered(8):
        pixels = np.zeros((20, 24), np.uint8)
        pixels[4:8, 2:6] = 100
        pixels[5:19, 15:23] = 200
        Image.fromarray(pixels).save(tmp_path / "ir" / f"{name}.png")
    module = set_up("fit", folder=own, crops_per_image=10)
    level = {"left": 100, "right": 200}
    found = 0
    for batch in module.train_dataloader():
        for place, (boxes, labels) in enumerate(zip(batch.boxes, batch.labels, strict=True)):
            assert len(boxes) == len(labels)
            for (x1, y1, x2, y2), label in zip(boxes.long().tolist(), labels, strict=True):
                inside = (batch.infrared[place, 0] * 255).round() == level[label]
                expected = torch.zeros_like(inside)
                expected[y1:y2, x1:x2] = True
                assert torch.equal(inside, expected)
                found += 1
    assert found > 50


def windows(module: FusionDataModule, epoch: int) -> tuple[list[str], torch.Tensor]:
    loader = module.train_dataloader()
    loader.sampler.set_epoch(epoch)
    batches = list(loader)
    return [name for batch in batches for name in batch.names], torch.cat([batch.visible for batch in batches])


@pytest.mark.parametrize(("size", "sizes"), [(4, [4, 4, 4, 2]), (6, [6, 6, 2]), (13, [13, 2]), (1, [1] * 14)])
def test_every_window_is_in_a_batch_of_two_or_more(own: str, size: int, sizes: list[int]) -> None:
    module = set_up("fit", folder=own, batch_size=size, crops_per_image=2)
    loader = module.train_dataloader()
    assert [len(batch) for batch in loader] == sizes and len(loader) == len(sizes)
    indices = sorted(index for _, index in loader.sampler)
    # With a single window left another one is drawn, so that none is lost.
    assert indices == list(range(sum(sizes))) and len(module.train_set) == 14


def test_windows_depend_on_seed_and_epoch_alone(own: str) -> None:
    module = set_up("fit", folder=own)
    windows(module, 0)
    names, pixels = windows(module, 3)
    torch.manual_seed(99)
    resumed_names, resumed = windows(set_up("fit", folder=own), 3)
    assert names == resumed_names and torch.equal(pixels, resumed)
    for other in (windows(module, 4), windows(set_up("fit", folder=own, seed=1), 3)):
        assert other[0] != names and other[1].shape == pixels.shape and not torch.equal(other[1], pixels)
    assert sorted(names) == sorted([*numbered(4), *numbered(3, 5)] * 2), "every pair as often as asked"
    sampler = module.train_dataloader().sampler
    sampler.set_epoch(4)
    assert {epoch for epoch, _ in sampler} == {4}
    first = [module.train_set[3, i].visible for i in range(len(module.train_set))]
    for epoch, dataset in ((4, module.train_set), (3, set_up("fit", folder=own, seed=1).train_set)):
        same = [torch.equal(window, dataset[epoch, i].visible) for i, window in enumerate(first)]
        assert sum(same) < len(same) / 2, "the windows themselves are new, not only their order"


def test_worker_processes_see_the_same_windows(own: str) -> None:
    alone, helped = (windows(set_up("fit", folder=own, num_workers=workers), 2) for workers in (0, 1))
    assert alone[0] == helped[0] and torch.equal(alone[1], helped[1])


class Seen(pl.LightningModule):
    """Remembers what Lightning hands it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[torch.Tensor] = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch.visible)
        return self.weight * 1.0

    def validation_step(self, batch, batch_idx):
        assert len(batch) == 1

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_lightning_hands_every_epoch_its_own_windows(own: str) -> None:
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    task, module = Seen(), set_up("fit", folder=own, batch_size=14)
    trainer = pl.Trainer(max_epochs=2, enable_model_summary=False, log_every_n_steps=1, **options)
    trainer.fit(task, module)
    assert len(task.seen) == 2
    assert all(torch.equal(task.seen[epoch], windows(module, epoch)[1]) for epoch in range(2))


def test_lightning_moves_a_batch(own: str) -> None:
    batch = set_up("test", folder=own).test_set[0]
    moved = FusionDataModule().transfer_batch_to_device(batch, torch.device("meta"), 0)
    tensors = [moved.infrared, moved.visible, moved.chroma, moved.night, moved.boxes[0]]
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert moved.names == batch.names and moved.labels == batch.labels and len(moved) == 1
    assert batch.infrared.device.type == "cpu"


def test_pixels_are_decoded_once_while_they_fit(own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = set_up("test", folder=own).test_set.pairs
    one = 20 * 24 * 4
    monkeypatch.setattr("tasks.fusion.data.KEPT_BYTES", 3 * one)
    dataset, forgetful = PairDataset(pairs, keep=True), PairDataset(pairs)
    first = [dataset[i].visible for i in range(len(pairs))]
    assert sorted(dataset.kept) == [0, 1, 2] and dataset.kept_bytes == 3 * one
    for pair in pairs[:3]:
        pair.visible.unlink()
    assert all(torch.equal(dataset[i].visible, first[i]) for i in range(len(pairs)))
    with pytest.raises(ValueError, match=r"00000\.png cannot be read"):
        forgetful[0]
