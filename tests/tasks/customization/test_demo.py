"""The demo's options."""

from pathlib import Path
from typing import Any

import pytest
from command_line import sentence

from tasks.customization import demo
from tasks.customization.profile import default_folder
from zoo.cli import main


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the page would have been served with."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(demo, "serve", lambda *args: calls.append(args))
    return calls


def test_the_page_is_for_this_computer_by_default(served: list[tuple[Any, ...]]) -> None:
    main(["demo", "customization", "--web"])
    assert served == [(default_folder(), "127.0.0.1", 7860)]


def test_options_of_the_page(served: list[tuple[Any, ...]], tmp_path: Path) -> None:
    main(["demo", "customization", "--web", "--profiles", str(tmp_path), "--host", "0.0.0.0", "--port", "0"])
    assert served == [(tmp_path, "0.0.0.0", 0)]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--web", "--user", "apa-00"], "--user is for the demo without --web."),
        (["--web", "--user", "apa-00", "--out", "x"], "--user and --out are for the demo without --web."),
        (["--profiles", "x"], "--profiles is for the demo with --web."),
        (["--port", "0", "--host", "::1"], "--host and --port are for the demo with --web."),
    ],
)
def test_options_that_would_be_ignored(
    served: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    assert expected in sentence(capsys, "demo", "customization", *words)
    assert not served
