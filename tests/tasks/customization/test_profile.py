"""Samples survive restarts, damage and hostile imports."""

import io
import json
import struct
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from tasks.customization import profile as profiles
from tasks.customization.characters import CHARACTERS
from tasks.customization.data import UserDataModule, read_class_folders
from tasks.customization.profile import Outcome, Profile, create_profile, find_profiles, read_png, to_png
from tasks.customization.strokes import SyntheticWriter

WRITER = SyntheticWriter(3)
IMAGES = {character: WRITER.write(character) for character in "AAaB8"}
OUTCOME = Outcome(8, 50.0, 100.0, "replay buffer", 1000, 90.0, 89.5, 100.0, True, [1, 2], [3, 4], 0.5, [], "0" * 64)


@pytest.fixture
def ada(tmp_path: Path) -> Profile:
    """A profile with four samples."""
    profile = Profile(tmp_path / create_profile(tmp_path, "Ada"))
    for character, image in IMAGES.items():
        profile.add(image, CHARACTERS.index(character))
    return profile


def contents(profile: Profile) -> list[tuple[int, bytes]]:
    return [sample.content for sample in profile.samples]


def zipped(files: dict[str, bytes]) -> dict[str, bytes]:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return {"samples.zip": buffer.getvalue()}


def test_samples_survive_a_restart_in_order(ada: Profile) -> None:
    again = Profile(ada.folder)
    assert contents(again) == contents(ada)
    assert [CHARACTERS[sample.label] for sample in again.samples] == list("AaB8")
    assert not again.problems


def test_the_layout_is_the_one_that_the_command_line_reads(ada: Profile) -> None:
    samples = read_class_folders(ada.folder / "samples")
    assert sorted(samples.labels.tolist()) == sorted(sample.label for sample in ada.samples)
    ada.add(WRITER.write("B"), CHARACTERS.index("B"))
    module = UserDataModule(source="folder", folder=str(ada.folder), user="samples", generic="none")
    module.setup()
    assert sum(len(part) for part in (module.users[0].train, module.users[0].val, module.users[0].test)) == 5


def test_export_and_import_carry_everything(ada: Profile, tmp_path: Path) -> None:
    other = Profile(tmp_path / create_profile(tmp_path, "Eve"))
    assert other.import_files({"ada.zip": ada.export_zip()}) == (4, 0)
    assert sorted(contents(other)) == sorted(contents(ada))
    assert other.import_files({"ada.zip": ada.export_zip()}) == (0, 4)
    unpacked = {"own/upper_C/x.PNG": to_png(WRITER.write("C")), "own/.DS_Store": b"", "own/upper_C/.hidden": b"x"}
    assert other.import_files(unpacked) == (1, 0)
    assert other.undo() == "Took 1 sample out again." and len(Profile(other.folder).samples) == 4


def test_undo_takes_steps_back_on_disk_too(ada: Profile) -> None:
    before = contents(ada)
    name = ada.samples[1].name
    ada.delete(name)
    assert len(Profile(ada.folder).samples) == 3
    with pytest.raises(ValueError, match="gone already"):
        ada.delete(name)
    assert ada.undo() == "Brought 1 sample back."
    assert contents(ada) == before == contents(Profile(ada.folder))
    for _ in range(4):
        ada.undo()
    assert not Profile(ada.folder).samples
    with pytest.raises(ValueError, match="nothing to undo"):
        ada.undo()


def test_start_over_leaves_nothing_but_what_cannot_be_read(ada: Profile) -> None:
    broken = ada.folder / "samples/upper_A/broken.png"
    broken.write_bytes(b"no picture")
    ada.model_folder.mkdir()
    (ada.model_folder / "model.safetensors").write_bytes(b"x")
    ada.write_outcome(OUTCOME)
    assert ada.start_over() == 4
    assert [path for path in ada.folder.rglob("*") if path.is_file()] == [broken]
    with pytest.raises(ValueError, match="nothing to undo"):
        ada.undo()


def test_the_same_sample_twice_is_refused(ada: Profile) -> None:
    # It could land among the samples learned from and among those held back.
    with pytest.raises(ValueError, match="saved already"):
        ada.add(IMAGES["A"], CHARACTERS.index("A"))
    assert len(ada.samples) == 4


def test_what_could_not_be_read_again_is_not_saved(ada: Profile) -> None:
    with pytest.raises(ValueError, match="black on white"):
        ada.add(np.full((28, 28), 255, np.uint8), 0)
    with pytest.raises(ValueError, match="no ink"):
        ada.add(np.zeros((28, 28), np.uint8), 0)
    assert len(ada.samples) == 4 == len(list((ada.folder / "samples").rglob("*.*")))


def test_a_full_disk_loses_nothing(ada: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    before = contents(ada)
    data = Profile(ada.folder).export_zip()
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        ada.add(WRITER.write("b"), CHARACTERS.index("b"))
    with pytest.raises(OSError, match="No space"):
        ada.import_files({"upper_D/d.png": to_png(WRITER.write("D"))})
    monkeypatch.undo()
    assert contents(ada) == before == contents(Profile(ada.folder)) and data
    assert not list(ada.folder.rglob("*.[0-9]*"))


def test_an_import_that_fails_half_way_is_taken_back(ada: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def fail_at_the_third(path: Path, data: bytes, check: object = None) -> None:
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(path)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)

    monkeypatch.setattr(profiles, "write_whole", fail_at_the_third)
    with pytest.raises(OSError, match="No space"):
        ada.import_files({f"upper_{c}/1.png": to_png(WRITER.write(c)) for c in "DEF"})
    assert len(ada.samples) == 4 and not any(path.exists() for path in written)


def test_damaged_files_are_reported_and_kept(ada: Profile) -> None:
    samples = ada.folder / "samples"
    (samples / "upper_A/1.png").write_bytes(to_png(IMAGES["A"])[:60])
    (samples / "upper_A/2.png").write_bytes(b"")
    (samples / "upper_A/.3.png.17").write_bytes(b"left behind by a crash")
    (samples / "umlaut").mkdir()
    (samples / "note.txt").write_text("hello")
    again = Profile(ada.folder)
    assert contents(again) == contents(ada)
    assert len(again.problems) == 4
    for name in ("1.png", "2.png", "umlaut", "note.txt"):
        assert sum(name in problem for problem in again.problems) == 1, again.problems
        assert list(samples.rglob(name))


def test_a_profile_whose_samples_are_no_folder_is_reported(tmp_path: Path) -> None:
    (tmp_path / "Ada").mkdir()
    (tmp_path / "Ada/samples").write_text("oops")
    profile = Profile(tmp_path / "Ada")
    assert not profile.samples and "cannot be read" in profile.problems[0]


def test_no_damage_of_a_file_is_more_than_a_sentence(tmp_path: Path) -> None:
    data, random = to_png(IMAGES["8"]), np.random.default_rng(0)
    path = tmp_path / "x.png"
    for trial in range(300):
        broken = bytearray(data)
        for place in random.integers(0, len(data), 1 + trial % 4):
            broken[place] = random.integers(256)
        if trial % 5 == 0:
            del broken[random.integers(len(broken)) :]
        path.write_bytes(bytes(broken))
        with suppress(ValueError):
            assert read_png(path).shape == (28, 28)


def png_header(width: int, height: int) -> bytes:
    """The beginning of a large picture."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


GOOD = to_png(IMAGES["8"])


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, "nothing to import"),
        ({"upper_A/.hidden.png": GOOD}, "nothing to import"),
        ({"photo.png": GOOD}, "is no sample"),
        ({"upper_A/note.txt": b"hello"}, "is no sample"),
        ({"umlaut/x.png": GOOD}, "names no class"),
        ({"upper_A/big.png": png_header(5000, 4000)}, r"'upper_A/big.png' is 5000 x 4000 pixels; expected 28 x 28"),
        ({"upper_A/huge.png": png_header(60000, 60000)}, "60000 x 60000 pixels"),
        ({"upper_A/x.png": b"GIF89a"}, "no PNG file"),
        ({"upper_A/x.png": GOOD[:70]}, "cannot be read"),
        ({"upper_A/x.png": to_png(np.full((28, 28), 255, np.uint8))}, "black on white"),
        ({"upper_A/x.png": b"x" * (profiles.MAX_IMPORT_BYTES + 1)}, "too much"),
        (zipped({"../../upper_A/x.png": GOOD}), "leads out of its folder"),
        (zipped({"/etc/upper_A/x.png": GOOD}), "leads out of its folder"),
        (zipped({"..\\upper_A\\x.png": GOOD}), "leads out of its folder"),
        (zipped({"C:/upper_A/x.png": GOOD}), "leads out of its folder"),
        (zipped({"upper_A/bomb.png": bytes(profiles.MAX_IMPORT_BYTES + 1)}), "unpacks to"),
        ({"samples.zip": zipped({"upper_A/x.png": GOOD})["samples.zip"][:-30]}, "zip cannot be read"),
        ({"samples.zip": b"hello"}, "zip cannot be read"),
        (zipped({}), "nothing to import"),
        (zipped({"readme.txt": b"hello"}), "is no sample"),
    ],
)
def test_hostile_imports(ada: Profile, files: dict[str, bytes], sentence: str) -> None:
    before = contents(ada)
    # Among good files, too, nothing is imported.
    fine = {} if "nothing" in sentence or "samples.zip" in files else {"digit_8/fine.png": to_png(WRITER.write("8"))}
    with pytest.raises(ValueError, match=sentence):
        ada.import_files({**fine, **files})
    assert contents(ada) == before == contents(Profile(ada.folder))
    assert not [path for path in ada.folder.parent.iterdir() if path != ada.folder]


def test_a_zip_whose_content_is_damaged(ada: Profile) -> None:
    data = bytearray(zipped({"upper_A/x.png": GOOD})["samples.zip"])
    data[60] ^= 0xFF
    with pytest.raises(ValueError, match="cannot be read"):
        ada.import_files({"samples.zip": bytes(data)})


@pytest.mark.parametrize(
    "name", ["", " ", "..", "../x", "a/b", "a\\b", ".hidden", "CON", "nul.txt", "x" * 41, "a\0", "a."]
)
def test_names_that_are_no_folders(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot be the name"):
        create_profile(tmp_path, name)
    assert not list(tmp_path.iterdir())


def test_names(tmp_path: Path) -> None:
    for name in ("Zoë", " Ada Lovelace ", "张伟", "o'Neil-2"):
        create_profile(tmp_path, name)
    assert find_profiles(tmp_path) == ["Ada Lovelace", "o'Neil-2", "Zoë", "张伟"]
    # A file system that ignores case would put both hands into one folder.
    with pytest.raises(ValueError, match="There is a profile 'Zoë' already"):
        create_profile(tmp_path, "ZOË")
    assert find_profiles(tmp_path / "missing") == []
    with pytest.raises(ValueError, match="Unknown profile 'Eve'"):
        Profile(tmp_path / "Eve")


def test_outcomes(ada: Profile) -> None:
    assert ada.read_outcome() is None
    outcome = Outcome(**{**profiles.asdict(OUTCOME), "answers": [("upper_A/1.png", 10, 3, 10)]})
    ada.write_outcome(outcome)
    read = ada.read_outcome()
    assert read and profiles.asdict(read) == json.loads(json.dumps(profiles.asdict(outcome)))
    whole = ada.outcome_file.read_text()
    content = json.loads(whole)
    for broken in (
        whole[:50],
        "[]",
        json.dumps({**content, "seconds": "fast"}),
        json.dumps({**content, "answers": [["x", 1, 2]]}),
        json.dumps({key: value for key, value in content.items() if key != "seconds"}),
    ):
        ada.outcome_file.write_text(broken)
        with pytest.raises(ValueError, match="is damaged"):
            ada.read_outcome()


def test_what_is_set_aside_is_reported_again(ada: Profile) -> None:
    ada.outcome_file.write_text("{")
    ada.set_aside(ada.outcome_file, "It is damaged.")
    assert ada.problems == ["It is damaged."] and ada.read_outcome() is None
    assert "set aside" in Profile(ada.folder).problems[0]
    assert next(ada.folder.glob("outcome.json.damaged-*")).read_text() == "{"


def test_two_programs_on_one_profile_do_not_overwrite_each_other(ada: Profile) -> None:
    other = Profile(ada.folder)
    for profile in (ada, other):
        profile.add(WRITER.write("g"), CHARACTERS.index("g"))
    assert len(Profile(ada.folder).samples) == 6


def test_samples_as_tensors(ada: Profile, tmp_path: Path) -> None:
    samples = ada.as_samples()
    assert samples.images.dtype == torch.uint8 and samples.images.shape == (4, 28, 28)
    with pytest.raises(ValueError, match="no samples yet"):
        Profile(tmp_path / create_profile(tmp_path, "Eve")).as_samples()


@pytest.mark.parametrize(
    ("platform", "variable", "end"),
    [("linux", "XDG_DATA_HOME", "moe-zoo/customization"), ("win32", "LOCALAPPDATA", "moe-zoo/customization")],
)
def test_default_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, platform: str, variable: str, end: str
) -> None:
    monkeypatch.setattr(profiles.sys, "platform", platform)
    monkeypatch.setenv(variable, str(tmp_path))
    assert profiles.default_folder() == tmp_path / end
