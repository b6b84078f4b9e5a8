"""What the page does, as plain functions of plain values: nothing here knows Gradio or HTML.

Everything that comes from the browser is checked here. What is wrong with it is a `ValueError`, `FileNotFoundError` or
`PermissionError` whose sentence the page shows.
"""

import base64
import binascii
import io
import math
import os
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, RLock, Thread
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tasks.customization.characters import CHARACTERS, MERGED_CHARACTERS, merge
from tasks.customization.customizer import Recipe, customize
from tasks.customization.data import CharacterDataModule, Samples, UserSamples, split_user, to_float
from tasks.customization.evaluate import accuracy, both_experts, overhead
from tasks.customization.model import CustomizedLeNet, Features
from tasks.customization.profile import MAX_IMPORT_BYTES, Outcome, Profile, Sample, create_profile, find_profiles
from tasks.customization.strokes import render
from tasks.customization.task import save_customized
from zoo import hub
from zoo.data import ENVIRONMENT_VARIABLE
from zoo.errors import DataNotFoundError

CHECKPOINT = "customization/lenet5-emnist"
TOP = 3
# A minute of scribbling is about 7,000 points.
MAX_POINTS = 20_000
# The fullest of EMNIST's characters covers 35 %.
MAX_INK = 0.6
EXPORTS = {"onnx": "onnx", "executorch": "pte"}
REPLAY, TEST_PART = "replay buffer", "EMNIST's test part"

Image = NDArray[np.uint8]
Ranking = list[tuple[str, float]]


@dataclass(frozen=True, slots=True)
class Answer:
    """What both models make of one image.

    Attributes:
        image: `(28, 28)`, as the models see it.
        before: The global model's best characters and their probabilities, best first.
        after: The customised model's; None where there is none yet.
        local: Whether the local expert answered.
        gate: The gate's probability.
        threshold: Above it the local expert answers.
    """

    image: Image
    before: Ranking
    after: Ranking | None
    local: bool = False
    gate: float = 0.0
    threshold: float = 1.0


@dataclass(slots=True)
class Job:
    """One customisation under way, in a thread of its own: a page that is closed does not stop it.

    Attributes:
        phase: What it does now.
        share: How much of that is done, 0..1.
        error: Why it failed, a sentence.
        done: Set at the end, well or not.
    """

    phase: str = "local expert"
    share: float = 0.0
    error: str = ""
    done: Event = field(default_factory=Event)

    def follow(self, seconds: float = 0.1) -> Iterator["Job"]:
        """This job now and then, the last time when it is done.

        Args:
            seconds: Time between two looks.
        """
        while not self.done.wait(seconds):
            yield self
        yield self


class Studio:
    """The global model, the people, and what each of them taught it."""

    def __init__(self, root: Path, checkpoint: str = CHECKPOINT, recipe: Recipe | None = None) -> None:
        """Load the global model; nothing is written before somebody adds a profile.

        Args:
            root: The folder of all profiles.
            checkpoint: Name of a zoo checkpoint, or a folder written by `zoo.save`.
            recipe: Hyperparameters of customisation.
        """
        self.root = root
        self.checkpoint = checkpoint
        self.recipe = recipe or Recipe()
        self.model = hub.load_as(checkpoint, CustomizedLeNet)
        self.cost = overhead(self.model)
        self._lock, self._generic_lock = RLock(), RLock()
        self._profiles: dict[str, Profile] = {}
        self._customised: dict[str, tuple[CustomizedLeNet, Outcome | None] | None] = {}
        self._jobs: dict[str, Job] = {}
        self._generic: tuple[str, Features, Tensor] | None = None

    # --- people ---

    def people(self) -> list[str]:
        """Names of all profiles."""
        return find_profiles(self.root)

    def add_person(self, name: Any) -> str:
        """Make a profile; its name."""
        with self._lock:
            person = create_profile(self.root, str(name or ""))
            # There may have been one of that name whose folder was deleted since.
            for known in (self._profiles, self._customised, self._jobs):
                known.pop(person, None)
        return person

    def profile(self, person: Any) -> Profile:
        """A person's profile, read once.

        Raises:
            ValueError: There is no such person.
        """
        if not person:
            raise ValueError("Whose hand is it? Add a name first.")
        with self._lock:
            if person not in self.people():
                raise ValueError(f"There is no profile {str(person)[:40]!r} any more: choose or add another.")
            if person not in self._profiles:
                self._profiles[person] = Profile(self.root / person)
            return self._profiles[person]

    def customised(self, person: Any) -> tuple[CustomizedLeNet, Outcome | None] | None:
        """A person's model and what making it changed; None before the first customisation.

        What is damaged is set aside and reported among the profile's problems.
        """
        profile = self.profile(person)
        with self._lock:
            if person not in self._customised:
                self._customised[person] = self._read_customised(profile)
            return self._customised[person]

    def _read_customised(self, profile: Profile) -> tuple[CustomizedLeNet, Outcome | None] | None:
        if not profile.model_folder.exists():
            return None
        try:
            model = hub.load_as(profile.model_folder, CustomizedLeNet)
        except (ValueError, OSError) as error:
            reason = f"The customised model cannot be used: {error} It was set aside; customise again."
            profile.set_aside(profile.model_folder, reason)
            return None
        try:
            outcome = profile.read_outcome()
        except ValueError as error:
            profile.set_aside(profile.outcome_file, f"{error} It was set aside; customise again to see new numbers.")
            return model, None
        # The numbers of another model, e.g. where power failed between the two files, are not shown.
        same = outcome and outcome.model_sha256 == hub.info(profile.model_folder).sha256
        return model, outcome if same else None

    # --- drawing ---

    @torch.inference_mode()
    def answer(self, strokes: Any, person: Any = None) -> Answer | None:
        """Read what is drawn; None for an empty canvas.

        Args:
            strokes: Polylines of x and y, as the browser sends them.
            person: Whose customised model answers beside the global one.
        """
        points = check_strokes(strokes)
        if not points:
            return None
        image = render(points)
        pixels = to_float(torch.from_numpy(image.copy())[None])
        before = self.model.features(pixels).logits
        customised = self.customised(person) if person else None
        if customised is None:
            return Answer(image, ranking(before), None)
        model = customised[0]
        mixed, routing = model(pixels, return_routing=True)
        return Answer(
            image,
            ranking(before),
            ranking(mixed),
            local=bool(routing.expert_index[0, 0] == 1),
            gate=float(routing.router_probs[0, 1]),
            threshold=float(model.threshold),
        )

    def save(self, strokes: Any, label: Any, person: Any) -> Sample:
        """Save what is drawn as a sample of a character."""
        points = check_strokes(strokes)
        if not points:
            raise ValueError("The canvas is empty: write one character, then say what it is.")
        index = check_label(label)
        image = render(points)
        if (image > 127).mean() > MAX_INK:
            raise ValueError("Nearly all of the canvas is ink: clear it and write one character with single strokes.")
        return self.profile(person).add(image, index)

    # --- samples ---

    def import_files(self, files: Any, person: Any) -> tuple[int, int]:
        """Take in files that the browser read.

        Args:
            files: `[{"name": path, "data": base64}, ...]`, or `{"too_large": bytes}` where it did not read them.
            person: Whose they are.

        Returns:
            How many samples were added, and how many were there already.
        """
        profile = self.profile(person)
        if isinstance(files, dict) and "too_large" in files:
            raise ValueError(
                f"That is more than {MAX_IMPORT_BYTES // 2**20} MiB, too much for handwriting of 28 x 28 pixels: "
                "choose class folders (digit_0, upper_A, lower_a) or their zip. Nothing was imported."
            )
        try:
            content = {str(file["name"]): base64.b64decode(file["data"], validate=True) for file in files}
        except (TypeError, KeyError, binascii.Error):
            raise ValueError("The files did not arrive whole: choose them again. Nothing was imported.") from None
        return profile.import_files(content)

    def start_over(self, person: Any) -> int:
        """Delete a person's samples and model; how many samples it were."""
        profile = self.profile(person)
        with self._lock:
            if self.job(person):
                raise ValueError("Customisation is under way: wait until it is done, then start over.")
            count = profile.start_over()
            self._customised.pop(person, None)
        return count

    # --- customisation ---

    def job(self, person: Any) -> Job | None:
        """The customisation under way for a person."""
        job = self._jobs.get(person)
        return job if job and not job.done.is_set() else None

    def start(self, person: Any) -> tuple[Job, bool]:
        """Begin to customise for a person, unless that is under way already.

        Returns:
            The job, and whether it is new.

        Raises:
            ValueError: There are too few samples.
        """
        profile = self.profile(person)
        with self._lock:
            running = self.job(person)
            if running:
                return running, False
            samples = profile.samples
            user = split_user(profile.name, profile.as_samples(), seed=0)
            job = self._jobs[person] = Job()
            # A daemon: the server ends at once on Ctrl-C, and files are written whole or not at all.
            Thread(target=self._run, args=(profile, samples, user, job), daemon=True).start()
            return job, True

    def _run(self, profile: Profile, samples: list[Sample], user: UserSamples, job: Job) -> None:
        """Learn, measure, save. Any failure ends as a sentence in the job."""
        try:
            self._customise(profile, samples, user, job)
        except Exception as error:
            job.error = f"Customisation failed: {error} Your samples are untouched."
            if not isinstance(error, ValueError | OSError):
                raise
        finally:
            job.done.set()

    def _customise(self, profile: Profile, samples: list[Sample], user: UserSamples, job: Job) -> None:
        def progress(phase: str, step: int, steps: int) -> None:
            job.phase, job.share = phase, step / steps

        images = torch.cat([user.train.images, user.val.images])
        labels = merge(torch.cat([user.train.labels, user.val.labels]))
        start = time.perf_counter()
        model = customize(self.model, to_float(images), labels, seed=0, recipe=self.recipe, progress=progress)
        seconds = time.perf_counter() - start
        job.phase, job.share = "measuring", 1.0
        measured = self._measure(model, samples, user.test)
        save_customized(model, profile.model_folder, user, self.checkpoint, {"source": "folder"})
        outcome = Outcome(
            learned_from=len(labels),
            seconds=seconds,
            model_sha256=hub.info(profile.model_folder).sha256,
            **measured,
        )
        profile.write_outcome(outcome)
        with self._lock:
            self._customised[profile.name] = model, outcome

    @torch.no_grad()
    def _measure(self, model: CustomizedLeNet, samples: list[Sample], held_back: Samples) -> dict[str, Any]:
        """What a customised model changed on the samples held back and on generic ones."""
        labels = merge(held_back.labels)
        features = model.features(to_float(held_back.images))
        _, mixed, routing = both_experts(model, features)
        name_of = {sample.content: sample.name for sample in samples}
        names = [
            name_of[label, image.numpy().tobytes()]
            for image, label in zip(held_back.images, held_back.labels.tolist(), strict=True)
        ]
        answers = [labels.tolist(), features.logits.argmax(1).tolist(), mixed.argmax(1).tolist()]
        generic, generic_features, generic_labels = self.generic()
        return {
            "own_before": accuracy(features.logits, labels),
            "own_after": accuracy(mixed, labels),
            "generic": generic,
            "generic_samples": len(generic_labels),
            "generic_before": accuracy(generic_features.logits, generic_labels),
            "generic_after": accuracy(model.classify(generic_features), generic_labels),
            "asked_local": 100 * (routing.expert_index == 1).float().mean().item(),
            "gate_open": bool(model.threshold < 1),
            "parameters": [int(self.cost[part]["parameters"]) for part in ("added", "global")],
            "macs": [int(self.cost[part]["macs"]) for part in ("added", "global")],
            "answers": list(zip(names, *answers, strict=True)),
        }

    def generic(self) -> tuple[str, Features, Tensor]:
        """Other people's samples that this device has: where they come from, their features and merged labels.

        Every fourth image of EMNIST's test part where `MOE_ZOO_DATA` holds it, else the replay buffer that travels with
        the model.
        """
        with self._generic_lock:
            if self._generic is None:
                self._generic = self._test_part() or (REPLAY, *self.model.replay())
            return self._generic

    def _test_part(self) -> tuple[str, Features, Tensor] | None:
        if not os.environ.get(ENVIRONMENT_VARIABLE):
            return None
        try:
            images, labels = generic_images()
        except DataNotFoundError:
            return None
        return TEST_PART, self.model.features(images), labels

    # --- taking it with you ---

    def export_samples(self, person: Any) -> tuple[str, bytes]:
        """Name and content of a zip file with all samples."""
        profile = self.profile(person)
        profile.as_samples()
        return f"{profile.name}-samples.zip", profile.export_zip()

    def export_model(self, person: Any) -> tuple[str, bytes]:
        """Name and content of a zip file with the customised model, a folder that `zoo.load` takes."""
        folder = self._model_folder(person)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(folder.iterdir()):
                archive.write(path, f"{person}-model/{path.name}")
        return f"{person}-model.zip", buffer.getvalue()

    def export_program(self, person: Any, kind: str) -> tuple[str, bytes]:
        """Name and content of the customised model for another runtime.

        Args:
            person: Whose model.
            kind: `onnx` or `executorch`.

        Raises:
            ValueError: There is no model yet, or the packages that write this format are missing.
        """
        folder = self._model_folder(person)
        from zoo.export import export

        with tempfile.TemporaryDirectory() as scratch:
            output = Path(scratch) / f"{person}.{EXPORTS[kind]}"
            export(folder, kind, output)
            return output.name, output.read_bytes()

    def _model_folder(self, person: Any) -> Path:
        if self.customised(person) is None:
            raise ValueError("There is no customised model yet: save some samples and press Customise first.")
        return self.profile(person).model_folder


def generic_images() -> tuple[Tensor, Tensor]:
    """Every fourth generic test image and its merged label, to see what others lose."""
    module = CharacterDataModule()
    module.setup()
    samples = module.test_set.samples
    return to_float(samples.images[::4]), samples.labels[::4]


def ranking(logits: Tensor) -> Ranking:
    """The best characters of one image's logits `(1, C)` and their probabilities, best first."""
    probabilities, classes = logits.softmax(1)[0].topk(TOP)
    names = [MERGED_CHARACTERS[index] for index in classes.tolist()]
    return list(zip(names, probabilities.tolist(), strict=True))


def check_label(label: Any) -> int:
    """The class of a character that was typed.

    Raises:
        ValueError: It is none of the 62.
    """
    text = str(label or "").strip()
    if not text:
        raise ValueError("What is it? Type the character, then save.")
    if len(text) != 1 or text not in CHARACTERS:
        raise ValueError(f"{text[:20]!r} is no character of this model: type one of 0-9, A-Z or a-z.")
    return CHARACTERS.index(text)


def check_strokes(strokes: Any) -> list[NDArray[np.float64]]:
    """Strokes as the browser sends them, those without a point left out.

    Args:
        strokes: A list of polylines, each a list of `[x, y]`; None is an empty canvas.

    Raises:
        ValueError: They are anything else, or too many.
    """
    found = []
    try:
        for stroke in strokes or []:
            points = [(float(x), float(y)) for x, y in stroke]
            if points:
                found.append(np.array(points))
    except (TypeError, ValueError, OverflowError):
        raise ValueError("The drawing did not arrive whole: clear the canvas and write again.") from None
    if sum(map(len, found)) > MAX_POINTS:
        raise ValueError("That drawing is too long for one character: clear the canvas and write again.")
    if not all(math.isfinite(value) and abs(value) < 1e6 for stroke in found for value in stroke.flat):
        raise ValueError("The drawing has points outside of the canvas: clear it and write again.")
    return found
