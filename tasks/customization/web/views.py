"""HTML of the page's parts; every text that a person chose is escaped."""

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from tasks.customization.characters import CHARACTERS, MERGED_CHARACTERS
from tasks.customization.data import MIN_SAMPLES
from tasks.customization.profile import Outcome, Sample, to_png
from tasks.customization.web.studio import REPLAY, Answer, Job, Ranking

# A page with thousands of pictures is slow, and nobody looks at them all.
NEWEST, MOST = 24, 200
PAIRS, PICTURES = 8, 24
# An accuracy on fewer samples says little.
FEW = 20

PHASES = {
    "local expert": "Learning the local expert",
    "gate": "Learning the gate",
    "measuring": "Measuring what changed",
}
NO_MODEL = "Not customised yet. Save some samples below, then press Customise."


def picture(image: NDArray[np.uint8], description: str) -> str:
    """An image of one character."""
    data = base64.b64encode(to_png(image)).decode()
    return f'<img class="mz-ink" src="data:image/png;base64,{data}" alt="{escape(description)}" width="28" height="28">'


def answers(answer: Answer | None) -> str:
    """Both models' best characters side by side; each is a button that saves the drawing as that character."""
    if answer is None:
        empty = '<p class="mz-faint">Write one character on the canvas.</p>'
        return f'<div class="mz-answers">{_panel("Global", "", empty)}{_panel("Customised", "", empty)}</div>'
    seen = f'<p class="mz-seen">{picture(answer.image, "what the models see")} what the models see, 28 x 28</p>'
    before = _panel("Global", "answered by the global expert", _bars(answer.before))
    if answer.after is None:
        after = _panel("Customised", "", f'<p class="mz-faint">{NO_MODEL}</p>')
    else:
        who = "local" if answer.local else "global"
        if answer.threshold >= 1:
            gate = "the gate is closed"
        else:
            sign = "&gt;" if answer.local else "&le;"
            gate = f"gate {answer.gate:.2f} {sign} {answer.threshold:.2f}"
        after = _panel("Customised", f"answered by the {who} expert ({gate})", _bars(answer.after))
    return f'<div class="mz-answers">{before}{after}</div>{seen}'


def _panel(title: str, who: str, body: str) -> str:
    return f'<section class="mz-panel"><h3>{title}</h3>{body}<p class="mz-who">{who}</p></section>'


def _bars(ranking: Ranking) -> str:
    rows = []
    for character, probability in ranking:
        percent = f"{100 * probability:.0f} %"
        rows.append(
            f'<li><button type="button" class="mz-pick" data-label="{character}" '
            f'aria-label="This is a {character}: save it ({percent})">'
            f'<b>{character}</b><span class="mz-bar"><i style="width:{100 * probability:.1f}%"></i></span>'
            f"<span>{percent}</span></button></li>"
        )
    return f"<ol>{''.join(rows)}</ol>"


def gallery(samples: Sequence[Sample], chosen: str = "") -> str:
    """How often each character was written, and the samples of one of them, or the newest, each with its button.

    Args:
        samples: All samples, oldest first.
        chosen: The character to show.
    """
    if not samples:
        return '<p class="mz-faint">No samples yet. Write a character, say what it is, and save it.</p>'
    counts = Counter(CHARACTERS[sample.label] for sample in samples)
    chips = [_chip("", f"newest {min(NEWEST, len(samples))}", not chosen)]
    chips += [
        _chip(character, f"{character} &times; {counts[character]}", character == chosen)
        for character in sorted(counts)
    ]
    shown = [sample for sample in samples if CHARACTERS[sample.label] == chosen] if chosen else samples[-NEWEST:]
    tiles = [_tile(sample) for sample in reversed(shown[-MOST:])]
    missing = [character for character in MERGED_CHARACTERS if character not in counts]
    hint = f'<p class="mz-faint">Not written yet: {" ".join(missing)}</p>' if missing else ""
    return (
        f'<div class="mz-chips" role="group" aria-label="Which samples to show">{"".join(chips)}</div>'
        f'<ul class="mz-tiles" aria-label="Samples">{"".join(tiles)}</ul>{hint}'
    )


def _chip(character: str, text: str, pressed: bool) -> str:
    state = "true" if pressed else "false"
    return f'<button type="button" class="mz-chip" data-show="{character}" aria-pressed="{state}">{text}</button>'


def _tile(sample: Sample) -> str:
    character = CHARACTERS[sample.label]
    return (
        f"<li>{picture(sample.image, f'a {character}')}<span>{character}</span>"
        f'<button type="button" class="mz-delete" data-sample="{escape(sample.name)}" '
        f'aria-label="Delete this {character}">&times;</button></li>'
    )


def samples_line(samples: Sequence[Sample], outcome: Outcome | None) -> str:
    """How many samples there are and whether the model knows them."""
    count = len(samples)
    if count < MIN_SAMPLES:
        return f"{count} saved. At least {MIN_SAMPLES} of two characters are needed; about 50 make a difference."
    if outcome is None:
        return f"{count} saved."
    again = "" if count == outcome.learned_from + len(outcome.answers) else " They have changed since: customise again."
    return f"{count} saved. The model learned from {outcome.learned_from}; a fifth was held back to check it.{again}"


def progress(job: Job) -> str:
    """How far a customisation is."""
    percent = round(100 * job.share)
    return (
        f'<p class="mz-progress"><label>{PHASES[job.phase]} '
        f'<progress max="100" value="{percent}">{percent} %</progress></label></p>'
    )


def outcome(found: Outcome | None, images: Mapping[str, NDArray[np.uint8]]) -> str:
    """What the last customisation changed: numbers, confusions and pictures.

    Args:
        found: The outcome.
        images: Images of the samples by name; those deleted since are not shown.
    """
    if found is None:
        return ""
    parts = [_numbers(found), _confusions(found), _changed(found, images)]
    if not found.gate_open:
        parts.insert(
            0,
            '<p class="mz-note">By your own samples the local expert does not help clearly enough yet, so '
            "the gate stays closed and the global expert answers as before. Write more samples.</p>",
        )
    return "".join(parts)


def _numbers(found: Outcome) -> str:
    held_back = len(found.answers)
    right = [sum(answer[1] == answer[place] for answer in found.answers) for place in (2, 3)]
    rows = [
        (
            f"your own {held_back} samples held back",
            f"{found.own_before:.1f} % ({right[0]} right)",
            f"{found.own_after:.1f} % ({right[1]} right)",
        ),
        (
            f"other people's {found.generic_samples:,} ({escape(found.generic)})",
            f"{found.generic_before:.1f} %",
            f"{found.generic_after:.1f} %",
        ),
        ("parameters", f"{found.parameters[1]:,}", _added(found.parameters)),
        ("multiply-accumulates per image", f"{found.macs[1]:,}", _added(found.macs)),
    ]
    body = "".join(f'<tr><th scope="row">{name}</th><td>{one}</td><td>{two}</td></tr>' for name, one, two in rows)
    note = (
        " Other people's samples are those that travel with the model; the gate has learned from them, so their "
        "accuracy after is a friendly estimate."
        if found.generic == REPLAY
        else ""
    )
    if held_back < FEW:
        note = f" Only {held_back} were held back: each counts for {100 / held_back:.0f} points.{note}"
    return (
        f'<div class="mz-wide"><table class="mz-table"><caption>Learned from {found.learned_from} samples in '
        f"{found.seconds:.1f} s. {found.asked_local:.0f} % of the samples held back went to the local expert.{note}"
        '</caption><thead><tr><td></td><th scope="col">before</th><th scope="col">after</th></tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _added(numbers: Sequence[int]) -> str:
    added, base = numbers
    return f"+{added:,} ({100 * added / base:.1f} %)"


def _confusions(found: Outcome) -> str:
    """The commonest confusions before, and how many of each are left."""
    before = Counter((true, said) for _, true, said, _ in found.answers if true != said)
    after = Counter((true, said) for _, true, _, said in found.answers if true != said)
    pairs = sorted(before | after, key=lambda pair: (-before[pair], -after[pair], pair))[:PAIRS]
    if not pairs:
        return '<p class="mz-faint">Nothing was confused, before or after.</p>'
    rows = "".join(
        f'<tr><th scope="row">{MERGED_CHARACTERS[true]} read as {MERGED_CHARACTERS[said]}</th>'
        f"<td>{before[true, said]}</td><td>{after[true, said]}</td></tr>"
        for true, said in pairs
    )
    return (
        '<div class="mz-wide"><table class="mz-table"><caption>What is confused with what, samples held back</caption>'
        '<thead><tr><td></td><th scope="col">before</th><th scope="col">after</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _changed(found: Outcome, images: Mapping[str, NDArray[np.uint8]]) -> str:
    repaired = [answer for answer in found.answers if answer[2] != answer[1] == answer[3]]
    broken = [answer for answer in found.answers if answer[2] == answer[1] != answer[3]]
    parts = []
    for title, changed in ((f"Repaired: {len(repaired)}", repaired), (f"Broken: {len(broken)}", broken)):
        tiles = [
            f"<li>{picture(images[name], f'a {MERGED_CHARACTERS[true]}')}"
            f"<span>{MERGED_CHARACTERS[before]} &rarr; {MERGED_CHARACTERS[after]}</span></li>"
            for name, true, before, after in changed[:PICTURES]
            if name in images
        ]
        parts.append(f'<h4>{title}</h4><ul class="mz-tiles">{"".join(tiles)}</ul>')
    return "".join(parts)


def message(text: str, error: bool = False) -> str:
    """What happened just now."""
    return f'<p class="{"mz-error" if error else "mz-done"}">{escape(text)}</p>' if text else ""


def problems(sentences: Sequence[str]) -> str:
    """What of a profile could not be read."""
    if not sentences:
        return ""
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return (
        '<div class="mz-error" role="alert"><p>Some files of this profile could not be read. They are left as they '
        f"are, and everything else works:</p><ul>{items}</ul></div>"
    )
