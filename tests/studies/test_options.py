"""The command line that studies share."""

import argparse
from pathlib import Path

import pytest

from studies.options import add_release_options, read_options, study_parser
from zoo.errors import UnknownNameError

METHODS = ("plain", "mixture")
RELEASE = ["--release", "mixture", "--seed", "1", "--commit", "abc", "--out", "there"]


def read(*arguments: str, releases_runs: bool = True) -> argparse.Namespace:
    parser = study_parser(None, Path("home"), METHODS, ["real", "generated"], (0, 1), ["plain"])
    if releases_runs:
        add_release_options(parser)
    return read_options(parser, list(arguments), METHODS)


def test_defaults_are_the_studys_own():
    options = read()
    assert (options.methods, options.seeds, options.source, options.folder) == (["plain"], [0, 1], "real", Path("home"))
    assert options.release is None


def test_a_release_names_its_run_and_its_folder():
    options = read(*RELEASE)
    assert (options.release, options.seed, options.commit, options.out) == ("mixture", 1, "abc", Path("there"))


@pytest.mark.parametrize("missing", range(0, len(RELEASE), 2))
def test_a_release_with_a_part_missing_is_refused(missing: int, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        read(*RELEASE[:missing], *RELEASE[missing + 2 :])
    assert "--release METHOD, --seed N, --commit COMMIT and --out FOLDER go together" in capsys.readouterr().err


def test_a_study_that_releases_no_single_run_needs_no_seed():
    assert read("--release", "mixture", "--out", "there", releases_runs=False).out == Path("there")


@pytest.mark.parametrize("arguments", [["--methods", "mixtrue"], [*RELEASE[2:], "--release", "mixtrue"]])
def test_an_unknown_method_is_refused(arguments: list[str]):
    with pytest.raises(UnknownNameError, match=r"method 'mixtrue'.*mixture"):
        read(*arguments)


def test_generated_results_are_never_written_over_those_of_the_study(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        read("--source", "generated")
    assert "--source generated needs a --folder of its own" in capsys.readouterr().err
    assert read("--source", "generated", "--folder", "elsewhere").folder == Path("elsewhere")
