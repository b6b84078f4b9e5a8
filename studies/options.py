"""The command line that studies share: methods and seeds, the source of data, where rows are, what is released."""

import argparse
from collections.abc import Collection, Sequence
from pathlib import Path

from zoo.errors import UnknownNameError

# What belongs to a release; --seed and --commit are there where a study has them.
RELEASE = {"release": "--release METHOD", "seed": "--seed N", "commit": "--commit COMMIT", "out": "--out FOLDER"}


def study_parser(
    doc: str | None,
    folder: Path,
    methods: Collection[str],
    sources: Sequence[str],
    seeds: Sequence[int],
    main: Collection[str] | None = None,
) -> argparse.ArgumentParser:
    """The options of every study; a study adds its own, and reads them with `read_options`.

    Args:
        doc: The study's docstring.
        folder: Where its committed results are.
        methods: All that there are.
        sources: Of its data, the default first; `generated` is the one for tests.
        seeds: Those that are run by default.
        main: Methods that are run by default; None leaves the choice to the study.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", metavar="NAME", default=main and list(main), help=", ".join(methods))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(seeds))
    parser.add_argument("--source", default=sources[0], choices=sources)
    parser.add_argument("--folder", type=Path, default=folder, help="where results/ and what is not committed are")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--only", choices=["table"], help="run nothing")
    parser.add_argument("--release", metavar="METHOD", help="write what it has learned to --out")
    parser.add_argument("--out", type=Path, help="folder of the checkpoint")
    return parser


def add_release_options(parser: argparse.ArgumentParser) -> None:
    """For studies that release one run."""
    parser.add_argument("--seed", type=int, help="of the run to release")
    parser.add_argument("--commit", help="that its row was made on, for the metadata of the checkpoint")


def read_options(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, methods: Collection[str]
) -> argparse.Namespace:
    """Read a command line and check it.

    Args:
        parser: Made by `study_parser`.
        arguments: The command line; that of the process if None.
        methods: All that there are.

    Raises:
        UnknownNameError: There is no such method.
        SystemExit: Options contradict one another, or argparse refuses one.
    """
    options = parser.parse_args(arguments)
    check_names([*(options.methods or []), *([options.release] if options.release else [])], methods)
    if options.source == "generated" and options.folder == parser.get_default("folder"):
        parser.error("--source generated needs a --folder of its own: its results are not those of the study.")
    needed = {name: text for name, text in RELEASE.items() if name in options}
    if len({getattr(options, name) is None for name in needed}) > 1:
        *first, last = needed.values()
        parser.error(f"{', '.join(first)} and {last} go together.")
    return options


def check_names(names: Sequence[str], methods: Collection[str]) -> None:
    """Refuse an unknown method.

    Args:
        names: Of methods.
        methods: All that there are.

    Raises:
        UnknownNameError: There is no such method.
    """
    for name in names:
        if name not in methods:
            raise UnknownNameError("method", name, methods)
