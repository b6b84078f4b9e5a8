"""One person's samples and customised model on disk: written whole or not at all, and never dropped when damaged.

<profiles>/<person>/samples/<digit_0 | upper_A | lower_a>/*.png    what `data.read_class_folders` reads
<profiles>/<person>/model/                                         a checkpoint of `zoo.save`
<profiles>/<person>/outcome.json                                   what the last customisation changed
"""

import io
import json
import os
import re
import shutil
import struct
import sys
import tempfile
import time
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from threading import RLock
from typing import Any, get_args, get_origin

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from tasks.customization.characters import folder_name, label_of_folder
from tasks.customization.data import Samples, read_class_folders, read_image
from tasks.customization.strokes import SIDE
from zoo.errors import UnknownNameError

# A person's whole handwriting in PNG files is a few megabytes; more is a mistake or an attack.
MAX_IMPORT_FILES = 20_000
MAX_IMPORT_BYTES = 32 * 2**20

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_DAMAGED = ".damaged-"
# Names that Windows keeps for devices.
_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(1, 10))}


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One character that a person wrote.

    Attributes:
        name: `<class folder>/<file>` below the samples.
        label: 0..61.
        image: `(28, 28)` uint8, white ink on black.
    """

    name: str
    label: int
    image: NDArray[np.uint8]

    @property
    def content(self) -> tuple[int, bytes]:
        """What makes it different from another sample: label and pixels."""
        return self.label, self.image.tobytes()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one customisation changed; accuracies and shares in percent.

    Attributes:
        learned_from: Number of samples learned from.
        own_before: Accuracy of the global expert on the samples held back.
        own_after: The same of the customised model.
        generic: What the generic accuracies are measured on, in words.
        generic_samples: How many samples that is.
        generic_before: Accuracy of the global expert on them.
        generic_after: The same of the customised model.
        asked_local: Share of the samples held back that the gate sent to the local expert.
        gate_open: Whether the gate opens at all.
        parameters: Added by local expert and gate, and of the global expert.
        macs: Multiply-accumulates for one image, likewise.
        seconds: Time that learning took.
        answers: Of every sample held back its name, its merged label, and the answers before and after.
        model_sha256: Hash of the weights that this belongs to.
    """

    learned_from: int
    own_before: float
    own_after: float
    generic: str
    generic_samples: int
    generic_before: float
    generic_after: float
    asked_local: float
    gate_open: bool
    parameters: list[int]
    macs: list[int]
    seconds: float
    answers: list[tuple[str, int, int, int]]
    model_sha256: str


def default_folder() -> Path:
    """Where this platform keeps a user's data, and profiles by default."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library/Application Support"
    else:
        base = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share")
    return base / "moe-zoo" / "customization"


def check_name(name: str) -> str:
    """A person's name that can be a folder's name on any platform.

    Args:
        name: What was typed.

    Returns:
        The name without spaces around it, in Unicode's composed form.

    Raises:
        ValueError: It cannot be one.
    """
    name = unicodedata.normalize("NFC", name).strip()
    fits = re.fullmatch(r"[^\W_][\w .'-]{0,39}", name) and not name.endswith(".")
    if not fits or name.split(".")[0].casefold() in _RESERVED:
        raise ValueError(
            f"{name!r} cannot be the name of a profile: use up to 40 letters, digits, spaces, points, hyphens or "
            "apostrophes, a letter or digit first."
        )
    return name


def find_profiles(root: Path) -> list[str]:
    """Names of all profiles below a folder, in alphabetical order."""
    if not root.is_dir():
        return []
    names = (path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    return sorted(names, key=str.casefold)


def create_profile(root: Path, name: str) -> str:
    """Make a new person's folder.

    Args:
        root: The folder of all profiles.
        name: What was typed.

    Returns:
        The profile's name.

    Raises:
        ValueError: The name will not do, or there is such a profile.
        PermissionError: The folder cannot be made.
    """
    name = check_name(name)
    same = [found for found in find_profiles(root) if found.casefold() == name.casefold()]
    if same:
        raise ValueError(f"There is a profile {same[0]!r} already: choose it, or add another name.")
    try:
        (root / name / "samples").mkdir(parents=True)
    except OSError as error:
        raise PermissionError(
            f"Cannot make the profile {root / name} ({error.strerror}): choose another folder with --profiles DIR."
        ) from None
    return name


class Profile:
    """One person's samples, in memory and on disk; every method may be called from any thread.

    Attributes:
        name: The person.
        folder: The profile's folder.
        problems: A sentence for each file that could not be read. Such files are left where they are.
    """

    def __init__(self, folder: Path) -> None:
        """Read a profile.

        Args:
            folder: Made by `create_profile`.

        Raises:
            UnknownNameError: There is no such folder.
        """
        if not folder.is_dir():
            raise UnknownNameError("profile", folder.name, find_profiles(folder.parent))
        self.name = folder.name
        self.folder = folder
        self.problems: list[str] = []
        self._lock = RLock()
        self._samples: dict[str, Sample] = {}
        # Each step: the samples it changed, and whether it added or deleted them.
        self._steps: list[tuple[list[Sample], bool]] = []
        self._last_number = 0
        self._read()

    @property
    def samples(self) -> list[Sample]:
        """All samples, oldest first."""
        with self._lock:
            return sorted(self._samples.values(), key=lambda sample: sample.name.split("/")[1])

    def as_samples(self) -> Samples:
        """All samples as tensors.

        Raises:
            ValueError: There is none.
        """
        samples = self.samples
        if not samples:
            raise ValueError(f"{self.name} has no samples yet: write some characters and save them.")
        images = torch.from_numpy(np.stack([sample.image for sample in samples]))
        return Samples(images, torch.tensor([sample.label for sample in samples]))

    def add(self, image: NDArray[np.uint8], label: int) -> Sample:
        """Save one sample.

        Args:
            image: `(28, 28)`, white ink on black.
            label: 0..61.

        Raises:
            ValueError: The very same sample is there already, or the image is none to learn from.
            OSError: It cannot be written.
        """
        added = self._add([(image, label)])
        if not added:
            raise ValueError("This very sample is saved already: clear the canvas and write the next one.")
        return added[0]

    def delete(self, name: str) -> Sample:
        """Delete one sample.

        Args:
            name: `Sample.name`.

        Raises:
            ValueError: There is no such sample.
        """
        with self._lock:
            if name not in self._samples:
                raise ValueError("This sample is gone already.")
            sample = self._remove(name)
            self._steps.append(([sample], False))
            return sample

    def undo(self) -> str:
        """Take back the last step since the profile was opened: an addition, an import or a deletion.

        Returns:
            What was done, in words.

        Raises:
            ValueError: There is nothing to take back.
        """
        with self._lock:
            if not self._steps:
                raise ValueError("There is nothing to undo.")
            samples, added = self._steps.pop()
            for sample in samples:
                if not added:
                    self._write(sample)
                elif sample.name in self._samples:
                    self._remove(sample.name)
            count = f"{len(samples)} sample{'s' * (len(samples) != 1)}"
            return f"Took {count} out again." if added else f"Brought {count} back."

    def start_over(self) -> int:
        """Delete all samples, the customised model and its outcome for good; what cannot be read stays.

        Returns:
            The number of samples deleted.
        """
        with self._lock:
            names = list(self._samples)
            for name in names:
                self._remove(name)
            self._steps.clear()
            if self.model_folder.is_dir():
                shutil.rmtree(self.model_folder)
            self.outcome_file.unlink(missing_ok=True)
            return len(names)

    def import_files(self, files: Mapping[str, bytes]) -> tuple[int, int]:
        """Take in class folders with PNG files, or one zip file of them: all or nothing.

        Args:
            files: Content by path; the last two parts of a path are `<class folder>/<file>.png`.

        Returns:
            How many samples were added, and how many were there already.

        Raises:
            ValueError: Anything in it is no sample; says what, and nothing is imported.
        """
        if [PurePosixPath(path).suffix.lower() for path in files] == [".zip"]:
            files = read_zip(*files.values())
        samples = read_files(files)
        added = self._add(
            [(image.numpy(), label) for image, label in zip(samples.images, samples.labels.tolist(), strict=True)]
        )
        return len(added), len(samples) - len(added)

    def export_zip(self) -> bytes:
        """All samples as a zip file with the person's name as its folder, the layout that `import_files` reads."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for sample in self.samples:
                archive.writestr(f"{self.name}/{sample.name}", to_png(sample.image))
        return buffer.getvalue()

    @property
    def model_folder(self) -> Path:
        """The folder of the customised model."""
        return self.folder / "model"

    @property
    def outcome_file(self) -> Path:
        """The file of the last outcome."""
        return self.folder / "outcome.json"

    def read_outcome(self) -> Outcome | None:
        """What the last customisation changed, if there was one.

        Raises:
            ValueError: The file is damaged.
        """
        try:
            content = json.loads(self.outcome_file.read_text("utf-8"))
            wrong = [field.name for field in fields(Outcome) if not _fits(content[field.name], field.type)]
            if wrong:
                raise TypeError(f"{wrong[0]} has the wrong type")
            return Outcome(**content)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise ValueError(f"{self.outcome_file} is damaged ({type(error).__name__}: {error}).") from None

    def write_outcome(self, outcome: Outcome) -> None:
        """Keep what a customisation changed."""
        with self._lock:
            write_whole(self.outcome_file, json.dumps(asdict(outcome), indent=1).encode())

    def set_aside(self, path: Path, reason: str) -> None:
        """Rename something damaged, so that nothing ever overwrites it, and report it now and at every start.

        Args:
            path: The model's folder or the outcome's file.
            reason: A sentence.
        """
        with self._lock:
            path.rename(path.with_name(f"{path.name}{_DAMAGED}{time.time_ns()}"))
            self.problems.append(reason)

    def _read(self) -> None:
        for path in sorted(self.folder.glob(f"*{_DAMAGED}*")):
            self.problems.append(f"{path} was set aside as damaged: delete it when you need it no more.")
        root = self.folder / "samples"
        try:
            root.mkdir(exist_ok=True)
            folders = sorted(path for path in root.iterdir() if not path.name.startswith("."))
        except OSError as error:
            self.problems.append(f"{root} cannot be read ({error.strerror}).")
            return
        for folder in folders:
            try:
                label = label_of_folder(folder.name)
                paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
            except (ValueError, OSError) as error:
                self.problems.append(f"{folder} is no folder of a class: {error}")
                continue
            for path in paths:
                try:
                    name = f"{folder.name}/{path.name}"
                    self._samples[name] = Sample(name, label, read_png(path))
                except (ValueError, OSError) as error:
                    self.problems.append(str(error))

    def _add(self, pairs: Sequence[tuple[NDArray[np.uint8], int]]) -> list[Sample]:
        """Write those that are not there yet, all or none."""
        with self._lock:
            known = {sample.content for sample in self._samples.values()}
            added: list[Sample] = []
            try:
                for image, label in pairs:
                    sample = Sample(f"{folder_name(label)}/{self._number():020d}.png", label, image)
                    if sample.content not in known:
                        known.add(sample.content)
                        self._write(sample)
                        added.append(sample)
            except (ValueError, OSError):
                for sample in added:
                    self._remove(sample.name)
                raise
            if added:
                self._steps.append((added, True))
            return added

    def _number(self) -> int:
        """Nanoseconds since 1970, never twice: two servers on one profile do not meet."""
        self._last_number = max(self._last_number + 1, time.time_ns())
        return self._last_number

    def _write(self, sample: Sample) -> None:
        path = self.folder / "samples" / sample.name
        write_whole(path, to_png(sample.image), check=read_png)
        self._samples[sample.name] = sample

    def _remove(self, name: str) -> Sample:
        (self.folder / "samples" / name).unlink(missing_ok=True)
        return self._samples.pop(name)


def read_files(files: Mapping[str, bytes]) -> Samples:
    """Samples from files of a person's own, none of whose names is trusted.

    Args:
        files: Content by path; the last two parts of a path are `<class folder>/<file>.png`.

    Returns:
        Samples, labels 0..61.

    Raises:
        ValueError: There are none, too many, or one is no sample.
    """
    chosen = {path: data for path, data in files.items() if not PurePosixPath(path).name.startswith(".")}
    if not chosen:
        raise ValueError("There is nothing to import: choose class folders (digit_0, upper_A, lower_a) or their zip.")
    size = sum(map(len, chosen.values()))
    if len(chosen) > MAX_IMPORT_FILES or size > MAX_IMPORT_BYTES:
        raise ValueError(
            f"{len(chosen)} files of {size / 2**20:.1f} MiB are too much for handwriting: import at most "
            f"{MAX_IMPORT_FILES} files and {MAX_IMPORT_BYTES // 2**20} MiB at once."
        )
    with tempfile.TemporaryDirectory() as scratch:
        for number, (path, data) in enumerate(chosen.items()):
            _unpack(path, data, Path(scratch), f"{number:05d}.png")
        return read_class_folders(Path(scratch))


def _unpack(path: str, data: bytes, folder: Path, name: str) -> None:
    """Write one file of an import into the class folder that its path names, if it is a sample."""
    parts = PurePosixPath(path.replace("\\", "/")).parts
    if len(parts) < 2 or not parts[-1].lower().endswith(".png"):
        raise ValueError(
            f"{path!r} is no sample: expected <digit_0 | upper_A | lower_a>/<name>.png. Nothing was imported."
        )
    try:
        target = folder / folder_name(label_of_folder(parts[-2])) / name
    except ValueError as error:
        raise ValueError(f"{path!r}: {error} Nothing was imported.") from None
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(data)
    try:
        read_png(target)
    except ValueError as error:
        # The person knows the file by its own name.
        raise ValueError(f"{str(error).replace(str(target), repr(path))} Nothing was imported.") from None


def read_zip(data: bytes) -> dict[str, bytes]:
    """Content of a zip file by path, nothing of it written anywhere.

    Args:
        data: The zip file.

    Raises:
        ValueError: It is damaged, too large, or a path in it leads out of its folder.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            for entry in entries:
                path = PurePosixPath(entry.filename.replace("\\", "/"))
                if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", entry.filename):
                    raise ValueError(
                        f"The zip holds {entry.filename!r}, a path that leads out of its folder: nothing was imported. "
                        "Take a zip that this page wrote."
                    )
            size = sum(entry.file_size for entry in entries)
            if len(entries) > MAX_IMPORT_FILES or size > MAX_IMPORT_BYTES:
                raise ValueError(
                    f"The zip unpacks to {len(entries)} files of {size / 2**20:.1f} MiB: import at most "
                    f"{MAX_IMPORT_FILES} files and {MAX_IMPORT_BYTES // 2**20} MiB at once."
                )
            # macOS adds a folder of its own to every zip.
            return {
                entry.filename: archive.read(entry) for entry in entries if not entry.filename.startswith("__MACOSX/")
            }
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"The zip cannot be read ({error}): nothing was imported.") from None


def read_png(path: Path) -> NDArray[np.uint8]:
    """As `data.read_image`, but a file of another size is refused by its header, before its pixels are unpacked.

    Args:
        path: The file.

    Raises:
        ValueError: It is no sample.
        OSError: It cannot be opened.
    """
    with path.open("rb") as file:
        header = file.read(24)
    if len(header) < 24 or not header.startswith(_PNG_SIGNATURE):
        raise ValueError(f"{path} is no PNG file.")
    width, height = struct.unpack(">II", header[16:])
    if (width, height) != (SIDE, SIDE):
        raise ValueError(f"{path} is {width} x {height} pixels; expected {SIDE} x {SIDE}.")
    try:
        return read_image(path)
    except (SyntaxError, zlib.error, struct.error, EOFError, IndexError) as error:
        # What Pillow raises for some damaged chunks.
        raise ValueError(f"{path} cannot be read as an image: {error}.") from None


def to_png(image: NDArray[np.uint8]) -> bytes:
    """A `(28, 28)` image as the content of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value read from JSON has a type; a tuple is a list there."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
    if origin is tuple:
        return isinstance(value, list) and len(value) == len(inner) and all(map(_fits, value, inner))
    return isinstance(value, int | float if kind is float else kind)


def write_whole(path: Path, data: bytes, check: Callable[[Path], object] | None = None) -> None:
    """Write a file so that a reader, or a machine that loses power, never sees half of it.

    Args:
        path: The file; its folder is made.
        data: Its content.
        check: Called with the file before it takes its place; what it raises keeps the file from being written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if check is not None:
            check(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
