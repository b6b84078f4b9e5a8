"""The page, wired with Gradio: what each control calls, and what changes then."""

import base64
import time
from collections.abc import Callable, Iterator
from functools import wraps
from inspect import isgeneratorfunction
from pathlib import Path
from typing import Any

import gradio as gr

from tasks.customization.profile import MAX_IMPORT_BYTES
from tasks.customization.web import views
from tasks.customization.web.studio import EXPORTS, Job, Studio

FOLDER = Path(__file__).parent

TITLE = """\
<h1>Teach the model your handwriting</h1>
<p class="mz-faint">Write, say what it is, press <i>Customise</i>: a small expert and a gate learn your hand on this
computer. Nothing leaves it.</p>"""

Changes = dict[Any, Any]


def asset(name: str) -> str:
    """A file beside this one."""
    return (FOLDER / name).read_text("utf-8")


def build(studio: Studio) -> gr.Blocks:
    """The page of a studio, not served yet."""
    with gr.Blocks(title="MoE Zoo: customization", analytics_enabled=False) as blocks:
        _Page(studio).wire(blocks)
    return blocks


class _Page:
    """The controls of the page; each handler returns the controls that change."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        gr.HTML(TITLE, js_on_load=None)
        self.status = gr.HTML(
            "", html_template=asset("status.html"), js_on_load=asset("status.js"), elem_id="mz-status"
        )
        with gr.Row(elem_classes="mz-bottom"):
            self.person = gr.Dropdown([], label="Whose hand is it?", elem_id="mz-person", scale=2, min_width=200)
            self.new_name = gr.Textbox(
                label="New person",
                placeholder="a name, then Enter",
                elem_id="mz-new",
                scale=2,
                min_width=160,
                max_length=80,
            )
            self.add = gr.Button("Add", elem_id="mz-add", scale=0, min_width=90)
        self.problems = gr.HTML("", js_on_load=None)
        with gr.Row():
            with gr.Column(scale=0, min_width=340):
                self.pad = gr.HTML([], html_template=asset("canvas.html"), js_on_load=asset("canvas.js"))
                with gr.Row(elem_classes="mz-bottom"):
                    self.label = gr.Textbox(
                        label="This is a", placeholder="0-9, A-Z, a-z", elem_id="mz-label", max_length=1, min_width=120
                    )
                    self.save = gr.Button("Save", variant="primary", elem_id="mz-save", min_width=90)
            with gr.Column(min_width=300):
                self.answers = gr.HTML(views.answers(None), js_on_load=asset("answers.js"), elem_id="mz-answers")
        gr.HTML("<h2>Your samples</h2>", js_on_load=None)
        self.line = gr.HTML("", js_on_load=None, elem_id="mz-line")
        self.gallery = gr.HTML("", js_on_load=asset("gallery.js"), elem_id="mz-gallery")
        self.chosen = gr.State("")
        with gr.Row():
            self.undo = gr.Button("Undo last step", elem_id="mz-undo", min_width=140)
            self.start_over = gr.Button("Start over", elem_id="mz-start-over", min_width=140)
        with gr.Group(visible=False) as self.confirmation:
            self.question = gr.HTML("", js_on_load=None, padding=True)
            with gr.Row():
                self.confirm = gr.Button("Delete everything", variant="stop", elem_id="mz-confirm", min_width=140)
                self.keep = gr.Button("Keep it", elem_id="mz-keep", min_width=140)
        gr.HTML("<h2>Customise</h2>", js_on_load=None)
        self.customise = gr.Button("Customise", variant="primary", elem_id="mz-customise")
        self.progress = gr.HTML("", js_on_load=None, elem_id="mz-progress")
        self.outcome = gr.HTML("", js_on_load=None, elem_id="mz-outcome")
        gr.HTML("<h2>Take it with you</h2>", js_on_load=None)
        gr.HTML('<p class="mz-faint">Bring samples that you have in files:</p>', js_on_load=None)
        self.carrier = gr.HTML(
            None,
            html_template=asset("carrier.html"),
            js_on_load=asset("carrier.js"),
            limit=MAX_IMPORT_BYTES,
            elem_id="mz-carrier",
        )
        gr.HTML('<p class="mz-faint">Download:</p>', js_on_load=None)
        with gr.Row():
            self.downloads = {
                kind: gr.Button(text, elem_id=f"mz-{kind}", min_width=150)
                for kind, text in (
                    ("samples", "Samples (zip)"),
                    ("model", "Model (safetensors)"),
                    ("onnx", "Model (ONNX)"),
                    ("executorch", "Model (ExecuTorch)"),
                )
            }

    def wire(self, blocks: gr.Blocks) -> None:
        """Say what each control calls."""
        fast = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        slow = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
        person, pad = self.person, self.pad
        profile = [self.problems, self.line, self.gallery, self.chosen, self.outcome]
        learning = [self.progress, self.customise, pad, *profile]

        def on(
            trigger: Callable[..., Any], handler: Any, inputs: list[Any], outputs: list[Any], **options: Any
        ) -> None:
            trigger(self._telling(handler), inputs, [self.status, *outputs], **options)

        on(blocks.load, self.on_load, [], [person, *profile], **fast)
        on(person.change, self.on_person, [person], [self.confirmation, *learning], **slow)
        for trigger in (self.add.click, self.new_name.submit):
            on(trigger, self.on_add, [self.new_name], [person, self.new_name], **fast)
        # Answers change here alone, and while one drawing is read the next waits: no old answer follows a new one.
        on(pad.input, self.on_draw, [pad, person], [self.answers], trigger_mode="always_last", **fast)
        for trigger in (self.save.click, self.label.submit):
            on(trigger, self.on_save, [pad, self.label, person], [pad, self.label, *profile], **fast)
        on(self.answers.pick, self.on_pick, [pad, person], [pad, self.label, *profile], **fast)
        on(self.gallery.remove, self.on_remove, [person, self.chosen], profile, **fast)
        on(self.gallery.show, self.on_show, [person], profile, **fast)
        on(self.undo.click, self.on_undo, [person, self.chosen], profile, **fast)
        on(self.start_over.click, self.on_start_over, [person], [self.confirmation, self.question], **fast)
        on(self.keep.click, self.on_keep, [], [self.confirmation], **fast)
        on(self.confirm.click, self.on_confirm, [person], [self.confirmation, pad, *profile], **fast)
        on(self.customise.click, self.on_customise, [person], learning, **slow)
        on(self.carrier.take, self.on_take, [self.carrier, person], [self.carrier, *profile], **fast)
        for kind, button in self.downloads.items():
            on(button.click, self._download(kind), [person], [self.carrier], **slow)

    def _telling(self, handler: Callable[..., Any]) -> Callable[..., Any]:
        """The handler; what the person did wrong becomes a message."""

        @wraps(handler)
        def told(*args: Any) -> Changes:
            try:
                result: Changes = handler(*args)
                return result
            except (ValueError, OSError) as error:
                return self._failed(error)

        @wraps(handler)
        def told_by_and_by(*args: Any) -> Iterator[Changes]:
            try:
                yield from handler(*args)
            except (ValueError, OSError) as error:
                yield self._failed(error)

        return told_by_and_by if isgeneratorfunction(handler) else told

    def _failed(self, error: Exception) -> Changes:
        return {self.status: views.message(str(error), error=True)}

    def _shown(self, person: Any, chosen: str = "") -> Changes:
        """All that shows a person's profile."""
        if not person:
            return {
                self.problems: "",
                self.line: "Choose whose hand it is, or add a name.",
                self.gallery: "",
                self.chosen: "",
                self.outcome: "",
            }
        customised = self.studio.customised(person)
        profile = self.studio.profile(person)
        samples, outcome = profile.samples, customised[1] if customised else None
        images = {sample.name: sample.image for sample in samples}
        return {
            self.problems: views.problems(profile.problems),
            self.line: views.samples_line(samples, outcome),
            self.gallery: views.gallery(samples, chosen),
            self.chosen: chosen,
            self.outcome: views.outcome(outcome, images),
        }

    def _ask(self, what: str) -> Changes:
        """Have the canvas be cleared (`clear`) or read once more (`again`); see canvas.js."""
        return {self.pad: {what: time.time_ns()}}

    def _done(self, text: str) -> Changes:
        return {self.status: views.message(text)}

    # --- handlers ---

    def on_load(self) -> Changes:
        """Show who there is; the only person is chosen at once."""
        people = self.studio.people()
        person = people[0] if len(people) == 1 else None
        return {self.person: gr.update(choices=people, value=person), **self._shown(person)}

    def on_person(self, person: Any) -> Iterator[Changes]:
        """Show a profile, and the customisation that may be under way there."""
        shown = {**self._shown(person), **self._ask("again"), self.confirmation: gr.update(visible=False)}
        job = self.studio.job(person)
        yield {self.progress: "", self.customise: gr.update(interactive=True), **shown}
        if job:
            yield from self._follow(job, person)

    def on_add(self, name: Any) -> Changes:
        """Add a person and choose it."""
        person = self.studio.add_person(name)
        return {
            self.person: gr.update(choices=self.studio.people(), value=person),
            self.new_name: "",
            **self._done(f"{person} has a profile now."),
        }

    def on_draw(self, strokes: Any, person: Any) -> Changes:
        """Read the drawing."""
        return {self.answers: views.answers(self.studio.answer(strokes, person))}

    def on_save(self, strokes: Any, label: Any, person: Any) -> Changes:
        """Save the drawing as a character, ready for the next one."""
        sample = self.studio.save(strokes, label, person)
        return {
            **self._ask("clear"),
            self.label: "",
            **self._shown(person),
            **self._done(f"Saved: {views.CHARACTERS[sample.label]}."),
        }

    def on_pick(self, event: gr.EventData, strokes: Any, person: Any) -> Changes:
        """Save the drawing as one of the answers."""
        return self.on_save(strokes, event.label, person)

    def on_remove(self, event: gr.EventData, person: Any, chosen: str) -> Changes:
        """Delete a sample."""
        sample = self.studio.profile(person).delete(str(event.sample))
        return {**self._shown(person, chosen), **self._done(f"Deleted: {views.CHARACTERS[sample.label]}.")}

    def on_show(self, event: gr.EventData, person: Any) -> Changes:
        """Show the samples of one character."""
        return self._shown(person, str(event.character))

    def on_undo(self, person: Any, chosen: str) -> Changes:
        """Take back the last step."""
        done = self.studio.profile(person).undo()
        return {**self._shown(person, chosen), **self._done(done)}

    def on_start_over(self, person: Any) -> Changes:
        """Ask first."""
        profile = self.studio.profile(person)
        question = f"Delete all {len(profile.samples)} samples and the customised model of {profile.name} for good?"
        return {self.confirmation: gr.update(visible=True), self.question: views.escape(question)}

    def on_keep(self) -> Changes:
        """Delete nothing."""
        return {self.confirmation: gr.update(visible=False)}

    def on_confirm(self, person: Any) -> Changes:
        """Delete everything."""
        count = self.studio.start_over(person)
        return {
            **self._shown(person),
            **self._ask("again"),
            self.confirmation: gr.update(visible=False),
            **self._done(f"Deleted {count} samples and the customised model."),
        }

    def on_customise(self, person: Any) -> Iterator[Changes]:
        """Learn, and show how far it is."""
        job, new = self.studio.start(person)
        if not new:
            yield self._done("Customisation is under way already: it is shown below.")
        yield from self._follow(job, person)

    def _follow(self, job: Job, person: Any) -> Iterator[Changes]:
        for step in job.follow():
            yield {self.progress: views.progress(step), self.customise: gr.update(interactive=False)}
        done = views.message(job.error, error=True) if job.error else views.message("Customised: see what it changed.")
        yield {
            self.status: done,
            self.progress: "",
            self.customise: gr.update(interactive=True),
            **self._shown(person),
            **self._ask("again"),
        }

    def on_take(self, files: Any, person: Any) -> Changes:
        """Import samples."""
        added, known = self.studio.import_files(files, person)
        already = f", {known} were here already" if known else ""
        return {self.carrier: None, **self._shown(person), **self._done(f"Imported {added} samples{already}.")}

    def _download(self, kind: str) -> Callable[[Any], Changes]:
        def on_download(person: Any) -> Changes:
            if kind == "samples":
                name, data = self.studio.export_samples(person)
            elif kind in EXPORTS:
                name, data = self.studio.export_program(person, kind)
            else:
                name, data = self.studio.export_model(person)
            content = {"download": name, "data": base64.b64encode(data).decode()}
            return {self.carrier: content, **self._done(f"{name} goes to your downloads.")}

        return on_download
