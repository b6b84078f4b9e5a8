"""The command `moe-zoo`: LightningCLI's fit, validate, test and predict, and what a zoo needs beside them.

Everything heavy is imported where it is used, so that names and help come at once.
"""

import argparse
import importlib
import importlib.util
import inspect
import json
import logging
import os
import pkgutil
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from zoo import hub
from zoo.errors import CheckpointError, UnknownNameError

HELP = """\
moe-zoo: Mixture-of-Experts models, from a checkpoint's name to its scores.

  moe-zoo list ['stocks/*'] [--json]     names of the checkpoints
  moe-zoo info NAME [--json]             what a checkpoint says about itself
  moe-zoo test NAME [--data.root DIR]    score a checkpoint by its own config
  moe-zoo fit|validate|test|predict -c configs/APP/VARIANT.yaml [--KEY VALUE ...]
                                         train, score or apply any model; options follow -c
  moe-zoo demo APP                       watch an application at work
  moe-zoo export NAME --format onnx|executorch --output FILE [--int8] [--trainable]
                                         write a checkpoint for another runtime, compared with PyTorch
  moe-zoo --version

Wherever NAME stands, a folder written by zoo.save will do.
--out DIR chooses the run folder, whose path is the last line printed; `fit -c ... --ckpt_path last` resumes a run.
`moe-zoo fit --help` lists the options, `moe-zoo fit --model.help CLASS` those of a model.
MOE_ZOO_DATA names the data folder. MOE_ZOO_DEBUG=1 shows the traceback of an error."""

LIGHTNING_COMMANDS = ("fit", "validate", "test", "predict")

# Said on every run and of no use to the person who runs it.
NOISE = ("💡 Tip", "GPU available: ", "TPU available: ", "Loading `train_dataloader` to estimate")
NOISY_WARNINGS = (
    "LightningCLI's args parameter is intended to run",  # main(args) is how tests and notebooks call it
    ".*does not have many workers",
    ".*is smaller than the logging interval",
    "Checkpoint directory .* exists and is not empty",  # resuming is the reason to have it
    ".*LeafSpec",  # from inside pytorch-lightning 2.6
)


def main(args: Sequence[str] | None = None) -> dict[str, float] | None:
    """Run a command line; a user's error ends it with one sentence and exit code 2, Ctrl-C with 130.

    Args:
        args: The words after `moe-zoo`; those of the process by default.

    Returns:
        The metrics of `test`, where `args` are given. The console script's own call returns nothing, since its
        result is taken for an exit code.
    """
    words = sys.argv[1:] if args is None else args
    try:
        metrics = run(words)
        sys.stdout.flush()
    except BrokenPipeError:
        # `moe-zoo list | head` has seen enough; Python flushes once more on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (KeyboardInterrupt, ValueError, OSError) as error:
        if os.environ.get("MOE_ZOO_DEBUG"):
            raise
        interrupted = isinstance(error, KeyboardInterrupt)
        sentence = " ".join(str(error).split()) or "Interrupted."
        print(f"moe-zoo: {sentence}", file=sys.stderr)
        raise SystemExit(130 if interrupted else 2) from None
    return None if args is None else metrics


def run(args: Sequence[str]) -> dict[str, float]:
    """Run a command line and let its errors through.

    Args:
        args: The words after `moe-zoo`.

    Returns:
        The metrics of `test`; other commands have none.
    """
    command, *rest = args or ["--help"]
    if command in LIGHTNING_COMMANDS:
        return _lightning(command, rest)
    others = {
        "list": _list,
        "info": _info,
        "demo": _demo,
        "export": _export,
        "--help": _help,
        "-h": _help,
        "--version": _version,
    }
    if command not in others:
        raise UnknownNameError("command", command, [*LIGHTNING_COMMANDS, *others], "moe-zoo --help explains them.")
    others[command](rest)
    return {}


# --- commands that need no torch -------------------------------------------------------------------------------------


def _help(_: Sequence[str]) -> None:
    print(HELP)


def _version(_: Sequence[str]) -> None:
    from zoo import __version__

    print(f"moe-zoo {__version__}")


def _list(args: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("moe-zoo list", description="Names of the checkpoints.")
    parser.add_argument("pattern", nargs="?", default="*", help="a name with wildcards, e.g. 'stocks/*'")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    options = parser.parse_args(args)
    names = hub.list_models(options.pattern)
    if options.json:
        print(json.dumps(names))
    elif names:
        print("\n".join(names))
    else:
        print(f"No checkpoint matches {options.pattern!r}.", file=sys.stderr)


def _info(args: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("moe-zoo info", description="What a checkpoint says about itself.")
    parser.add_argument("name", help="a name of `moe-zoo list`, or a folder written by zoo.save")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    options = parser.parse_args(args)
    found = hub.info(options.name)
    if options.json:
        print(json.dumps(found.to_dict(), indent=2, ensure_ascii=False))
    else:
        _print_info(found)


def _print_info(found: hub.ModelInfo) -> None:
    from zoo.report import print_table

    card = found.card
    facts = {
        "task": card.task,
        "description": card.description,
        "did the mixture pay?": card.verdict or None,
        "data": card.data,
        "terms of the data": card.data_terms,
        "licence of the weights": card.weights_licence,
        "class": found.class_path,
        "parameters": found.parameters,
        "bytes": found.size,
        "folder": found.path,
    }
    print_table(f"{found.name}: {card.title}", [{"field": key, "value": value} for key, value in facts.items()])
    for result in card.results:
        seed = "" if result.seed is None else f", seed {result.seed}"
        rows = [{"metric": key, "value": value} for key, value in result.metrics.items()]
        print_table(f"{result.command} (commit {result.commit}{seed})", rows)


def _demo(args: Sequence[str]) -> None:
    spec = importlib.util.find_spec("tasks")
    folders = spec.submodule_search_locations if spec and spec.submodule_search_locations else []
    names = sorted(path.parent.name for folder in folders for path in Path(folder).glob("*/demo.py"))
    if not args:
        raise ValueError(f"Name the application to demonstrate: moe-zoo demo {'|'.join(names)}.")
    if args[0] not in names:
        raise UnknownNameError("demo", args[0], names)
    importlib.import_module(f"tasks.{args[0]}.demo").main(list(args[1:]))


def _export(args: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("moe-zoo export", description="Write a checkpoint for another runtime.")
    parser.add_argument("name", help="a name of `moe-zoo list`, or a folder written by zoo.save")
    parser.add_argument("--format", required=True, help="onnx or executorch")
    parser.add_argument("--output", required=True, help="file to write; its folder must exist, the file must not")
    parser.add_argument("--int8", action="store_true", help="quantise statically, and score that beside float32")
    parser.add_argument(
        "--trainable",
        action="store_true",
        help="executorch: an inference program, and x.training.pte beside x.pte, with which a device learns",
    )
    options = parser.parse_args(args)
    from zoo.export import export
    from zoo.report import print_table

    done = export(options.name, options.format, options.output, trainable=options.trainable, int8=options.int8)
    rows: list[dict[str, Any]] = [{"file": str(file), "bytes": file.stat().st_size} for file in done.files]
    rows[0]["batch"] = done.batch
    print_table(f"{options.name} as {options.format}", rows)
    print(f"Largest difference from PyTorch in float32, on golden and random inputs: {done.difference:.2g}")
    if done.metrics:
        print_table(
            f"int8 on {done.source} (%)", [{"measure": key, "value": value} for key, value in done.metrics.items()]
        )


# --- LightningCLI ----------------------------------------------------------------------------------------------------


def _lightning(command: str, args: Sequence[str]) -> dict[str, float]:
    words = [command, *_located(_by_name(command, args))]
    with warnings.catch_warnings():
        for message in NOISY_WARNINGS:
            warnings.filterwarnings("ignore", message)
        from pytorch_lightning.utilities.exceptions import MisconfigurationException  # type: ignore[attr-defined]

        logging.getLogger("pytorch_lightning.utilities.rank_zero").addFilter(_is_useful)
        # The applications' classes can be named without their modules once they are imported.
        importlib.import_module("tasks")
        try:
            return _run_lightning_cli(command, words)
        except argparse.ArgumentError as error:
            raise _explained(str(error)) from None
        except MisconfigurationException as error:
            raise ValueError(str(error)) from error
        except ValueError as error:
            # What a class raised while it was built, wrapped by jsonargparse.
            raise (_explained(str(error)) if str(error).startswith("Does not validate") else error) from None
        except SystemExit as error:
            # Lightning answers Ctrl-C with exit code 1.
            if isinstance(error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt("Interrupted before the end: there are no results.") from None
            raise


def _run_lightning_cli(command: str, words: list[str]) -> dict[str, float]:
    import pytorch_lightning as pl
    from pytorch_lightning.cli import LightningCLI, SaveConfigCallback

    from zoo.callbacks import EpochSeed
    from zoo.report import run_folder
    from zoo.task import MoETask

    class ZooCLI(LightningCLI):
        """LightningCLI that keeps all files of a run in its run folder."""

        def before_instantiate_classes(self) -> None:
            self.metrics: dict[str, float] = {}
            self.folder = run_folder(self.config[command].trainer.default_root_dir)
            if self.config[command].get("ckpt_path") == "last" and not list(
                _checkpoints(self.folder).glob("last*.ckpt")
            ):
                raise FileNotFoundError(f"There is no last.ckpt in {_checkpoints(self.folder)}: run fit first.")

        def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
            ours = _run_files(command, self.folder, self.model, self.config_init[command].trainer)
            ours["callbacks"].append(EpochSeed(int(self.config[command].seed_everything)))
            return super().instantiate_trainer(**ours, **kwargs)

        def fit(self, **kwargs: Any) -> None:
            try:
                self.trainer.fit(**kwargs)
            except SystemExit:
                if not self.trainer.interrupted:
                    raise
                raise KeyboardInterrupt(_how_to_resume(self.folder)) from None

        def test(self, **kwargs: Any) -> None:
            # The task's own table says it better than Lightning's.
            self.trainer.test(**{**kwargs, "verbose": False})
            self.metrics = self.model.report(self.folder)

        def after_predict(self) -> None:
            self.model.report_predictions(self.folder)

    one_line_errors: dict[str, Any] = {"exit_on_error": False}
    cli = ZooCLI(
        MoETask,
        pl.LightningDataModule,
        save_config_callback=SaveConfigCallback if command == "fit" else None,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={"default_root_dir": "runs"},
        seed_everything_default=0,
        parser_kwargs=one_line_errors | {name: dict(one_line_errors) for name in LIGHTNING_COMMANDS},
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        args=words,
    )
    print(cli.folder)
    return cli.metrics


def _run_files(command: str, folder: Path, task: Any, configured: Any) -> dict[str, Any]:
    """The trainer's arguments that put logs and checkpoints into the run folder, unless a config says otherwise.

    Raises:
        ValueError: Several processes would share what is scored.
    """
    from pytorch_lightning.callbacks import ModelCheckpoint
    from pytorch_lightning.loggers import CSVLogger

    callbacks = list(configured.callbacks or [])
    if configured.enable_checkpointing is not False:
        files: dict[str, Any] = {
            "dirpath": _checkpoints(folder),
            "save_on_train_epoch_end": True,
            "enable_version_counter": False,
        }
        # Two callbacks: Lightning's save_last writes only when the best one is written. The last one comes last, as it
        # stores what the other has judged best: a resumed run would else rank against a state one epoch old.
        if task.monitor:
            callbacks.append(ModelCheckpoint(filename="best", monitor=task.monitor, mode=task.monitor_mode, **files))
        callbacks.append(ModelCheckpoint(filename="last", **files))
    logger = configured.logger
    if logger is None:
        logger = CSVLogger(folder, name="logs") if command == "fit" else False
    found = {"callbacks": callbacks, "logger": logger}
    if command in ("test", "predict"):
        # Each of several processes would report on its own samples alone.
        devices, nodes = configured.devices, configured.num_nodes
        one = devices in ("auto", 1, "1") or (isinstance(devices, list) and len(devices) == 1)
        if not one or nodes != 1:
            raise ValueError(
                f"trainer.devices={devices}, trainer.num_nodes={nodes}: {command} runs on one device: set both to 1, "
                "or name one in a list."
            )
        if devices == "auto":
            found["devices"] = 1
    return found


def _checkpoints(folder: Path) -> Path:
    return folder / "checkpoints"


def _how_to_resume(folder: Path) -> str:
    last = _checkpoints(folder) / "last.ckpt"
    if not last.is_file():
        return "Interrupted before the first epoch ended: there is nothing to resume."
    return f"Interrupted. The last finished epoch is in {last}; the same command with --ckpt_path last resumes it."


def _by_name(command: str, args: Sequence[str]) -> list[str]:
    """`test NAME ...` is `test -c <its config> --model.pretrained NAME ...`; the config's network is left out."""
    if not args or args[0].startswith("-"):
        return list(args)
    if command == "fit":
        raise ValueError(
            f"fit takes -c CONFIG first; to go on from the checkpoint {args[0]} add --model.pretrained {args[0]}."
        )
    name, *rest = args
    config = hub.info(name).path / "config.yaml"
    if not config.is_file():
        raise CheckpointError(f"{name} holds no config.yaml, so give one: moe-zoo {command} -c CONFIG.")
    without = ["--model.network=null"] if _builds_network(config) else []
    return ["-c", str(config), f"--model.pretrained={name}", *without, *rest]


def _builds_network(config: Path) -> bool:
    import yaml

    try:
        content = yaml.safe_load(config.read_text("utf-8"))
    except yaml.YAMLError as error:
        raise CheckpointError(f"{config} is damaged, no YAML: {' '.join(str(error).split())}") from error
    model = content.get("model") if isinstance(content, dict) else None
    return isinstance(model, dict) and "network" in (model.get("init_args") or {})


def _located(args: Sequence[str]) -> list[str]:
    """Read `--out` as the trainer's folder, and find configs that travel with the package from any folder."""
    words: list[str] = []
    for word in args:
        if words and words[-1] in ("-c", "--config"):
            word = _config(word)
        words.append("--trainer.default_root_dir" + word[5:] if re.match(r"--out(=|$)", word) else word)
    return words


def _config(path: str) -> str:
    if Path(path).is_file():
        return path
    if (hub.assets() / path).is_file():
        return str(hub.assets() / path)
    shipped = (found.relative_to(hub.assets()).as_posix() for found in hub.assets().glob("configs/*/*.yaml"))
    raise UnknownNameError("config", path, shipped)


def _is_useful(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(NOISE)


# --- errors of jsonargparse, in one sentence -------------------------------------------------------------------------


def _explained(message: str) -> ValueError:
    where = re.search(r'Parser key "([\w.]+)"', message)
    path = re.search(r"Problem with given class_path '([\w.]+)'", message)
    if path and path[1].startswith("pytorch_lightning."):
        return ValueError("Options of model and data follow the config that names their classes: put -c CONFIG first.")
    if re.search(r"arguments are required: \w+\.data", message):
        return ValueError(
            "Nothing says what to run: give -c CONFIG (see configs/), or the name of a checkpoint to test."
        )
    option = re.search(r"Option '([\w.]+)' is not accepted", message)
    if option and path:
        return UnknownNameError(f"option of {path[1]}", option[1], _parameters(pkgutil.resolve_name(path[1])))
    unknown = re.search(r"(?:does not accept option '|unrecognized arguments: -*)([\w.]+)", message)
    if unknown:
        return UnknownNameError("option", unknown[1], _options(), "moe-zoo fit --help lists them all.")
    given = re.search(r"Expected a dot import path string: (\S+)", message)
    missing = re.search(r"has no attribute|No module named '([\w.]+)'", message)
    # A module that the class itself imports is no misspelt class: its name is no beginning of the class path.
    misspelt = path and missing and path[1].startswith(missing[1] or "")
    if where and where[1] in ("model", "data") and (given or misspelt):
        name = given[1] if given else path[1]  # type: ignore[index]
        known = _classes(where[1], name)
        return UnknownNameError(f"class for {where[1]!r}", name, known, "A dotted class path always works.")
    noise = r"Does not validate.*|Subtypes: .*|Errors:|- Expected a <class 'NoneType'>|Given value.*"
    return ValueError(" ".join(re.sub(rf"(?m)^\s*(?:{noise})$", "", message).split()).removeprefix("- "))


def _parameters(klass: type) -> list[str]:
    return [name for name in inspect.signature(klass).parameters if name not in ("self", "args", "kwargs")]


def _options() -> list[str]:
    from pytorch_lightning import Trainer

    top = ("config", "model", "data", "trainer", "seed_everything", "ckpt_path", "out")
    return [*top, *(f"trainer.{name}" for name in _parameters(Trainer))]


def _classes(key: str, name: str) -> list[str]:
    """The applications' classes that could have been meant by a name, dotted if that is."""
    import pytorch_lightning as pl

    from zoo.task import MoETask

    for module in ("task", "data"):
        for folder in importlib.import_module("tasks").__path__:
            for path in Path(folder).glob(f"*/{module}.py"):
                # An application whose extra is not installed has no class to offer.
                with suppress(ImportError):
                    importlib.import_module(f"tasks.{path.parent.name}.{module}")
    base: type = MoETask if key == "model" else pl.LightningDataModule
    dotted = "." in name
    return [f"{klass.__module__}.{klass.__name__}" if dotted else klass.__name__ for klass in _subclasses(base)]


def _subclasses(base: type) -> Iterator[type]:
    for klass in list[type](base.__subclasses__()):
        if not inspect.isabstract(klass):
            yield klass
        yield from _subclasses(klass)
