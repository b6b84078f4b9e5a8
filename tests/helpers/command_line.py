"""What the tests of several commands share."""

import pytest

from zoo.cli import main


def sentence(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one line that a failing command prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]
