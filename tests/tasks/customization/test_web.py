"""The page: its work as plain functions, its HTML, its server, and, where there is one, a real browser."""

import asyncio
import base64
import io
import json
import os
import shutil
import socket
import sys
import zipfile
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from command_line import sentence

import zoo
from tasks.customization.characters import CHARACTERS, MERGED_CHARACTERS, folder_name
from tasks.customization.customizer import Recipe
from tasks.customization.data import to_float, write_all_classes
from tasks.customization.profile import Outcome, Profile, to_png
from tasks.customization.strokes import render
from tasks.customization.web import server, studio, views
from tasks.customization.web.server import Guard, is_loopback, listen
from tasks.customization.web.studio import Answer, Job, Studio, check_label, check_strokes
from zoo.cli import main
from zoo.errors import DataNotFoundError

QUICK = Recipe(expert_steps=60, gate_steps=60, copies=1)
STROKES = [[[10.0, 10.0], [200.0, 30.0]], [[100.0, 20.0], [100.0, 250.0]]]  # a T
MESSAGES = (ValueError, OSError)


@pytest.fixture(autouse=True)
def _no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOE_ZOO_DATA", raising=False)


def write(work: Studio, person: str, seed: int = 3) -> None:
    """Have a synthetic writer write all characters twice."""
    samples = write_all_classes(seed, 2)
    pairs = zip(samples.images, samples.labels.tolist(), strict=True)
    work.profile(person).import_files(
        {f"{folder_name(label)}/{number}.png": to_png(image.numpy()) for number, (image, label) in enumerate(pairs)}
    )


def done(job: Job) -> Job:
    assert job.done.wait(60)
    return job


@pytest.fixture
def work(tmp_path: Path) -> Studio:
    """A studio with one person who has written nothing yet."""
    work = Studio(tmp_path, recipe=QUICK)
    work.add_person("Ada")
    return work


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    """A studio whose one person has customised; tests that use it change nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MOE_ZOO_DATA", raising=False)
        work = Studio(tmp_path_factory.mktemp("profiles"), recipe=QUICK)
        work.add_person("Ada")
        write(work, "Ada")
        assert not done(work.start("Ada")[0]).error
    return work


# --- drawing ---------------------------------------------------------------------------------------------------------


def test_the_answer_is_the_models_on_the_training_datas_preparation(taught: Studio) -> None:
    answer = taught.answer(STROKES, "Ada")
    assert answer and (answer.image == render(check_strokes(STROKES))).all()
    pixels = to_float(torch.from_numpy(answer.image.copy())[None])
    base = zoo.load(taught.checkpoint)
    mine = zoo.load(taught.profile("Ada").model_folder)
    with torch.no_grad():
        logits, routing = mine(pixels, return_routing=True)
        for shown, found in ((answer.before, base(pixels)), (answer.after, logits)):
            probability, best = found.softmax(1)[0].sort(descending=True)
            assert shown == [
                (MERGED_CHARACTERS[index], pytest.approx(value, abs=1e-6))
                for value, index in zip(probability[:3].tolist(), best[:3].tolist(), strict=True)
            ]
    assert answer.local == (routing.expert_index.item() == 1) == (answer.gate > answer.threshold)
    assert answer.threshold == pytest.approx(mine.threshold.item())


def test_before_customisation_only_the_global_model_answers(work: Studio) -> None:
    for person in (None, "Ada"):
        answer = work.answer(STROKES, person)
        assert answer and answer.after is None and len(answer.before) == 3
    assert work.answer([], "Ada") is None and work.answer(None) is None


@pytest.mark.parametrize(
    "strokes",
    [
        "abc",
        17,
        {"a": 1},
        [1, 2],
        [[[1, 2, 3]]],
        [[[1, "x"]]],
        [[[1, None]]],
        [[[float("nan"), 0]]],
        [[[float("inf"), 0]]],
        [[[1e300, 0]]],
        [[[10**400, 0]]],
        [[[0, 0]] * 20_001],
    ],
)
def test_hostile_strokes(work: Studio, strokes: Any) -> None:
    for call in (lambda: work.answer(strokes, "Ada"), lambda: work.save(strokes, "a", "Ada")):
        with pytest.raises(ValueError, match="clear"):
            call()
    assert not work.profile("Ada").samples


@pytest.mark.parametrize("label", [None, "", " ", "ß", "ab", "\n\t", "é", "😀", "<b>", ["a", "b"], 17])
def test_labels_outside_the_classes(work: Studio, label: Any) -> None:
    with pytest.raises(ValueError, match=r"0-9, A-Z or a-z|What is it"):
        work.save(STROKES, label, "Ada")
    assert not work.profile("Ada").samples


def test_every_class_can_be_typed() -> None:
    assert [check_label(f" {character}") for character in CHARACTERS] == list(range(62))


def test_an_empty_and_a_full_canvas(work: Studio) -> None:
    with pytest.raises(ValueError, match="canvas is empty"):
        work.save([], "a", "Ada")
    full = [[[0, y], [280, y]] for y in range(0, 281, 4)]
    assert work.answer(full, "Ada")
    with pytest.raises(ValueError, match="Nearly all of the canvas is ink"):
        work.save(full, "a", "Ada")
    assert not work.profile("Ada").samples


def test_a_saved_drawing_is_what_the_models_saw(work: Studio) -> None:
    sample = work.save(STROKES, "T", "Ada")
    answer = work.answer(STROKES)
    assert answer and (Profile(work.root / "Ada").samples[0].image == answer.image).all()
    assert CHARACTERS[sample.label] == "T"
    with pytest.raises(ValueError, match="saved already"):
        work.save(STROKES, "T", "Ada")


# --- people ----------------------------------------------------------------------------------------------------------


def test_two_people_have_two_profiles(taught: Studio, tmp_path: Path) -> None:
    work = Studio(tmp_path, recipe=QUICK)
    for person in ("Ada", "Eve"):
        work.add_person(person)
    write(work, "Ada", 3)
    work.save(STROKES, "T", "Eve")
    assert [len(work.profile(person).samples) for person in work.people()] == [124, 1]
    done(work.start("Ada")[0])
    assert work.customised("Ada") and work.customised("Eve") is None


def test_a_person_that_is_not_there(work: Studio) -> None:
    for person in (None, "", "Eve", "../x", ["Ada"], {"a": 1}, 3):
        with pytest.raises(ValueError, match=r"Add a name|no profile"):
            work.save(STROKES, "T", person)
    (work.root / "Ada/samples").rmdir()
    (work.root / "Ada").rmdir()
    with pytest.raises(ValueError, match="no profile 'Ada' any more"):
        work.profile("Ada")
    work.add_person("Ada")
    assert not work.profile("Ada").samples


# --- customisation ---------------------------------------------------------------------------------------------------


def test_the_outcome_is_what_the_models_do(taught: Studio) -> None:
    model, outcome = taught.customised("Ada") or (None, None)
    samples = {sample.name: sample for sample in taught.profile("Ada").samples}
    assert model and outcome and outcome.learned_from + len(outcome.answers) == len(samples)
    images = torch.stack([torch.from_numpy(samples[answer[0]].image) for answer in outcome.answers])
    base = zoo.load(taught.checkpoint)
    with torch.no_grad():
        before, after = (network(to_float(images)).argmax(1).tolist() for network in (base, model))
        generic, labels = base.replay()
        kept = 100 * (model.classify(generic).argmax(1) == labels).float().mean().item()
    merged = [MERGED_CHARACTERS[answer[1]] for answer in outcome.answers]
    characters = [CHARACTERS[samples[answer[0]].label] for answer in outcome.answers]
    assert all(one.upper() == other.upper() for one, other in zip(merged, characters, strict=True))
    assert [list(answer[2:]) for answer in outcome.answers] == [list(pair) for pair in zip(before, after, strict=True)]
    right = sum(answer[1] == answer[3] for answer in outcome.answers)
    assert outcome.own_after == pytest.approx(100 * right / len(outcome.answers))
    assert outcome.own_after > outcome.own_before
    assert (outcome.generic, outcome.generic_samples) == ("replay buffer", 1000)
    assert outcome.generic_after == pytest.approx(kept)
    assert outcome.parameters == [1430, 64851] and outcome.seconds > 0


def test_a_restart_keeps_samples_model_and_outcome(taught: Studio) -> None:
    again = Studio(taught.root, recipe=QUICK)
    before, after = taught.customised("Ada"), again.customised("Ada")
    assert before and after and before[1] and after[1]
    assert after[1].own_after == before[1].own_after and len(again.profile("Ada").samples) == 124
    assert not again.profile("Ada").problems
    pixels = torch.rand(5, 1, 28, 28)
    with torch.no_grad():
        assert torch.allclose(before[0](pixels), after[0](pixels), atol=1e-5)


def test_two_clicks_are_one_customisation(work: Studio) -> None:
    write(work, "Ada")
    first, new = work.start("Ada")
    second, again = work.start("Ada")
    assert first is second and (new, again) == (True, False)
    with pytest.raises(ValueError, match="wait until it is done"):
        work.start_over("Ada")
    shares = [job.share for job in first.follow(0.01)]
    assert shares == sorted(shares) or first.phase == "measuring"
    assert not first.error and work.job("Ada") is None and len(work.profile("Ada").samples) == 124
    assert work.start_over("Ada") == 124 and work.customised("Ada") is None


def test_a_page_closed_while_learning_changes_nothing(work: Studio) -> None:
    write(work, "Ada")
    job, _ = work.start("Ada")
    watching = job.follow(0.01)
    next(watching)
    watching.close()
    work.profile("Ada").delete(work.profile("Ada").samples[0].name)
    done(job)
    assert work.customised("Ada") and len(Profile(work.root / "Ada").samples) == 123


def test_too_little_to_learn_from(work: Studio) -> None:
    with pytest.raises(ValueError, match="no samples yet"):
        work.start("Ada")
    for step in range(6):
        work.save([[[0, 0], [5 + step, 30]]], "l", "Ada")
    with pytest.raises(ValueError, match="at least two classes"):
        work.start("Ada")
    assert work.job("Ada") is None and len(work.profile("Ada").samples) == 6


def test_a_failure_is_a_sentence_and_costs_nothing(work: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    write(work, "Ada")
    monkeypatch.setattr(studio, "save_customized", fail)
    job = done(work.start("Ada")[0])
    assert "No space left" in job.error and "samples are untouched" in job.error
    assert work.customised("Ada") is None and len(Profile(work.root / "Ada").samples) == 124
    monkeypatch.undo()
    assert not done(work.start("Ada")[0]).error


@pytest.fixture
def copied(taught: Studio, tmp_path: Path) -> Path:
    """A copy of the taught person's profiles to damage."""
    return Path(shutil.copytree(taught.root, tmp_path / "profiles"))


def test_a_damaged_model_is_reported_and_kept(copied: Path) -> None:
    weights = copied / "Ada/model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    work = Studio(copied, recipe=QUICK)
    assert work.customised("Ada") is None
    (problem,) = work.profile("Ada").problems
    assert "cannot be used" in problem and "customise again" in problem
    assert list(copied.glob("Ada/model.damaged-*/model.safetensors")) and len(work.profile("Ada").samples) == 124
    done(work.start("Ada")[0])
    assert work.customised("Ada") and list(copied.glob("Ada/model.damaged-*"))


def test_a_damaged_or_foreign_outcome_is_not_shown(copied: Path) -> None:
    path = copied / "Ada/outcome.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_sha256": "0" * 64}))
    found = Studio(copied).customised("Ada")
    assert found and found[1] is None
    path.write_text("{")
    work = Studio(copied)
    found = work.customised("Ada")
    assert found and found[1] is None and "outcome.json is damaged" in work.profile("Ada").problems[0]
    assert list(copied.glob("Ada/outcome.json.damaged-*"))


def test_generic_samples_are_the_test_part_where_there_is_one(
    work: Studio, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MOE_ZOO_DATA", str(tmp_path))  # without characters/
    assert work.generic()[0] == "replay buffer"
    samples = write_all_classes(1, 1)
    other = Studio(tmp_path)
    monkeypatch.setattr(studio, "generic_images", lambda: (to_float(samples.images), samples.labels))
    assert other.generic()[0] == "EMNIST's test part" and len(other.generic()[2]) == 62


def test_generic_images_need_data() -> None:
    with pytest.raises(DataNotFoundError):
        studio.generic_images()


# --- imports and exports ---------------------------------------------------------------------------------------------


def test_what_the_browser_read_is_imported(work: Studio) -> None:
    image = render(check_strokes(STROKES))
    file = {"name": "own/upper_T/1.png", "data": base64.b64encode(to_png(image)).decode()}
    assert work.import_files([file], "Ada") == (1, 0)
    name, data = work.export_samples("Ada")
    assert name == "Ada-samples.zip" and zipfile.ZipFile(io.BytesIO(data)).namelist()[0].startswith("Ada/upper_T/")


@pytest.mark.parametrize(
    "files", [{"too_large": 10**9}, None, 3, "x", [3], [{"name": "a"}], [{"name": "a", "data": "%%"}], [{}], []]
)
def test_hostile_payloads(work: Studio, files: Any) -> None:
    with pytest.raises(ValueError, match="choose"):
        work.import_files(files, "Ada")


def test_the_customised_model_can_be_taken_along(
    taught: Studio, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, data = taught.export_model("Ada")
    zipfile.ZipFile(io.BytesIO(data)).extractall(tmp_path)
    taken, kept = zoo.load(tmp_path / "Ada-model"), taught.customised("Ada")
    assert name == "Ada-model.zip" and kept and torch.equal(taken.local_expert.up, kept[0].local_expert.up)
    zoo.hub.verify(tmp_path / "Ada-model")
    words = ["predict", str(tmp_path / "Ada-model"), "--out", str(tmp_path / "run")]
    assert sentence(capsys, *words).endswith("Name it with --data.folder DIR."), "whose hand, it cannot know"
    _, samples = taught.export_samples("Ada")
    zipfile.ZipFile(io.BytesIO(samples)).extractall(tmp_path / "samples")
    main([*words, f"--data.folder={tmp_path / 'samples'}", "--trainer.enable_progress_bar=false"])
    rows = pd.read_parquet(tmp_path / "run/predictions.parquet")
    assert len(rows) == 124 and all((tmp_path / "samples" / name).is_file() for name in rows.id)


def test_programs_for_other_runtimes(taught: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo import export

    def written(folder: Path, kind: str, output: Path) -> None:
        output.write_text(f"{kind} of {folder.parent.name}")

    monkeypatch.setattr(export, "export", written)
    assert taught.export_program("Ada", "onnx") == ("Ada.onnx", b"onnx of Ada")
    assert taught.export_program("Ada", "executorch") == ("Ada.pte", b"executorch of Ada")


def test_a_missing_extra_is_named(taught: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    with pytest.raises(ValueError, match="moe-zoo\\[export\\]"):
        taught.export_program("Ada", "onnx")


def test_nothing_to_take_along_yet(work: Studio) -> None:
    for call in (work.export_samples, work.export_model, lambda person: work.export_program(person, "onnx")):
        with pytest.raises(ValueError, match=r"no samples yet|no customised model yet"):
            call("Ada")


# --- HTML ------------------------------------------------------------------------------------------------------------


def test_answers_name_who_answered(taught: Studio) -> None:
    image = render(check_strokes(STROKES))
    ranking = [("T", 0.9), ("7", 0.08), ("Y", 0.02)]
    local = views.answers(Answer(image, ranking, ranking, local=True, gate=0.8, threshold=0.5))
    assert "answered by the local expert (gate 0.80 &gt; 0.50)" in local and local.count("This is a T") == 2
    closed = views.answers(Answer(image, ranking, ranking))
    assert "answered by the global expert (the gate is closed)" in closed
    assert "Not customised yet" in views.answers(Answer(image, ranking, None))
    assert "Write one character" in views.answers(None)


def test_the_outcome_shows_every_number(taught: Studio) -> None:
    found = taught.customised("Ada")
    assert found and found[1]
    images = {sample.name: sample.image for sample in taught.profile("Ada").samples}
    html = views.outcome(found[1], images)
    repaired = sum(answer[2] != answer[1] == answer[3] for answer in found[1].answers)
    for text in (f"{found[1].own_before:.1f} %", f"{found[1].own_after:.1f} %", "+1,430 (2.2 %)", "+4,823 (1.1 %)"):
        assert text in html
    assert f"Repaired: {repaired}" in html and "friendly estimate" in html and "replay buffer" in html
    assert "&rarr;" in html and "&rarr;" not in views.outcome(found[1], {})  # all samples deleted since
    assert views.outcome(None, images) == ""


def test_confusions_are_counted() -> None:
    a, b, c = (MERGED_CHARACTERS.index(character) for character in "g9q")
    answers = [("1", a, b, a), ("2", a, b, a), ("3", a, b, b), ("4", c, c, a)]
    outcome = Outcome(9, 25.0, 50.0, "EMNIST's test part", 9, 1.0, 1.0, 50.0, False, [1, 9], [1, 9], 1.0, answers, "")
    html = views.outcome(outcome, {})
    assert '<th scope="row">g read as 9</th><td>3</td><td>1</td>' in html
    assert '<th scope="row">q read as g</th><td>0</td><td>1</td>' in html
    assert "gate stays closed" in html and "Repaired: 2" in html and "Broken: 1" in html
    assert "each counts for 25 points" in html and "EMNIST&#x27;s" in html and "friendly" not in html


def test_the_gallery(taught: Studio) -> None:
    samples = taught.profile("Ada").samples
    assert "No samples yet" in views.gallery([])
    newest, chosen = views.gallery(samples), views.gallery(samples, "q")
    assert newest.count("mz-delete") == 24 and chosen.count("mz-delete") == 2 and 'aria-label="Delete this q"' in chosen
    assert "Not written yet" not in newest and "Not written yet: 0 1 2" in views.gallery(samples[-1:])


def test_what_a_person_chose_is_escaped() -> None:
    assert "<b>" not in views.message("<b>") + views.problems(["<b>"]) and views.message("") == views.problems([]) == ""


def test_the_line_says_what_is_missing(taught: Studio) -> None:
    found = taught.customised("Ada")
    samples = taught.profile("Ada").samples
    assert found and "At least 5" in views.samples_line(samples[:3], None)
    assert views.samples_line(samples, None) == "124 saved."
    assert "customise again" not in views.samples_line(samples, found[1])
    assert "customise again" in views.samples_line(samples[:-1], found[1])
    assert "local expert" in views.progress(Job(share=0.5)) and 'value="50"' in views.progress(Job(share=0.5))


# --- serving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "origin", "loopback", "allowed"),
    [
        ("127.0.0.1:7860", None, True, True),
        ("localhost:7860", "http://localhost:7860", True, True),
        ("[::1]:7860", None, True, True),
        ("evil.example:7860", None, True, False),
        ("evil.example", "http://evil.example", True, False),
        ("127.0.0.1:7860", "http://evil.example", True, False),
        ("127.0.0.1:7860", "http://127.0.0.1:9999", True, False),
        ("127.0.0.1:7860", "null", True, False),
        ("", None, True, False),
        ("192.168.1.5:7860", None, True, False),
        ("192.168.1.5:7860", "http://192.168.1.5:7860", False, True),
        ("192.168.1.5:7860", "http://evil.example", False, False),
    ],
)
def test_who_is_answered(host: str, origin: str | None, loopback: bool, allowed: bool) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"the page"})

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    sent: list[dict[str, Any]] = []
    headers = [(b"host", host.encode())] + ([(b"origin", origin.encode())] if origin else [])
    asyncio.run(Guard(app, loopback)({"type": "http", "headers": headers}, None, send))
    assert sent[0]["status"] == (200 if allowed else 403)
    assert (b"default-src 'self'" in dict(sent[0]["headers"]).get(b"content-security-policy", b"")) == allowed
    assert (sent[1]["body"] == b"the page") == allowed


def test_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.1.5", "example.org", "")))


def test_an_address_that_cannot_be_had() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"Cannot listen on 127.0.0.1 port {port} .*--host and --port"):
            listen("127.0.0.1", port)
    for host, number in (("127.0.0.1", 99_999), ("256.1.1.1", 0), ("127.0.0.1", -1)):
        with pytest.raises(OSError, match="Cannot listen"):
            listen(host, number)
    with listen("127.0.0.1", 0) as free:
        assert free.getsockname()[0] == "127.0.0.1"


def test_without_gradio_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "True")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ValueError, match=r"pip install 'moe-zoo\[demo\]'"):
        server.serve(tmp_path, "127.0.0.1", 0)
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"


def test_the_page_fetches_nothing_from_elsewhere() -> None:
    folder = Path(server.__file__).parent
    for path in folder.iterdir():
        if path.suffix in {".js", ".html", ".css"}:
            assert "//" not in path.read_text().replace("// ", ""), path
