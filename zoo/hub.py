"""Checkpoints: folders that hold everything a trained model needs, checked on every load.

A checkpoint is a folder `checkpoints/<application>/<name>/`:

- `model.safetensors`: the weights, whose sha256 stands in the metadata;
- `metadata.json`: class path and constructor arguments, data and its terms, results and the commands that made them;
- `README.md`: the model card, written from the metadata;
- `golden.safetensors`: one input and its output, compared by `verify`;
- `config.yaml`: what `moe-zoo test NAME` runs.

torch is imported where it is used, so that names can be listed without it.
"""

import hashlib
import inspect
import json
import pkgutil
import platform
import re
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from zoo.errors import CheckpointError, UnknownNameError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

M = TypeVar("M", bound="nn.Module")

FORMAT_VERSION = 1
# What marks numbers that were not measured now.
RECORDED = " (recorded)"
FILES = ("model.safetensors", "metadata.json", "README.md", "golden.safetensors", "config.yaml")
GOLDEN_TOLERANCE = 1e-4
_METRICS_BEGIN, _METRICS_END = "<!-- metrics -->", "<!-- /metrics -->"


@dataclass(frozen=True)
class Result:
    """Numbers and how to get them again: the command, the commit it ran on, and its seed."""

    metrics: dict[str, float]
    command: str
    commit: str
    seed: int | None = None


@dataclass(frozen=True)
class Card:
    """What a checkpoint says about itself, in words and numbers.

    Attributes:
        title: The model in a few words.
        task: What it does, e.g. `"handwritten character recognition"`.
        description: A paragraph for the model card.
        data: What it was trained on.
        data_terms: What that data may be used for.
        weights_licence: The licence of the weights, apart from the code's.
        verdict: One line that says whether the mixture paid.
        preprocessing: How to prepare an input, as plain values: size, mean, tokenizer source, fitted normaliser.
        classes: Class names in the order of the outputs.
        results: Measured numbers, each set with the command that made it.
    """

    title: str
    task: str
    description: str
    data: str
    data_terms: str
    weights_licence: str
    verdict: str = ""
    preprocessing: dict[str, Any] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)


@dataclass(frozen=True)
class ModelInfo:
    """A checkpoint as `metadata.json` describes it.

    Attributes:
        name: Its name in the zoo, or the folder it was read from.
        path: Its folder.
        class_path: The class to build, dotted.
        init_args: That class's constructor arguments.
        card: What it says about itself.
        parameters: Number of parameters.
        size: Bytes of `model.safetensors`.
        sha256: Hash of `model.safetensors`.
        versions: Versions of what wrote it.
    """

    name: str
    path: Path
    class_path: str
    init_args: dict[str, Any]
    card: Card
    parameters: int
    size: int
    sha256: str
    versions: dict[str, str]

    @property
    def metrics(self) -> dict[str, float]:
        """All measured numbers, whichever command made them."""
        return {key: value for result in self.card.results for key, value in result.metrics.items()}

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-plain values."""
        return {**asdict(self), "path": str(self.path), "metrics": self.metrics}


def assets() -> Path:
    """The folder that holds `configs/` and `checkpoints/`: inside the wheel, or the clone itself."""
    packaged = Path(__file__).parent / "_assets"
    return packaged if packaged.is_dir() else Path(__file__).parents[1]


def list_models(pattern: str = "*") -> list[str]:
    """Names of the zoo's checkpoints in natural order.

    Args:
        pattern: A name with wildcards, e.g. `"stocks/*"`.
    """
    root = assets() / "checkpoints"
    names = (path.parent.relative_to(root).as_posix() for path in root.glob("*/*/metadata.json"))
    return sorted((name for name in names if fnmatchcase(name, pattern)), key=_natural)


def info(name_or_folder: str | Path) -> ModelInfo:
    """Read what a checkpoint says about itself.

    Args:
        name_or_folder: A name of `list_models()`, or a folder written by `save`.

    Raises:
        UnknownNameError: There is no such name and no such folder.
        CheckpointError: The folder's metadata is missing or damaged.
    """
    folder = _folder(name_or_folder)
    path = folder / "metadata.json"
    try:
        raw = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no metadata.json, so it is no checkpoint of zoo.save.") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not readable as JSON ({error}): fetch the checkpoint again.") from None
    return _parse(str(name_or_folder), folder, raw)


def load(name_or_folder: str | Path) -> "nn.Module":
    """Build a checkpoint's model and fill it; hash, keys and shapes are always checked.

    Args:
        name_or_folder: A name of `list_models()`, or a folder written by `save`.

    Returns:
        The model in eval mode on the CPU, in the dtypes that its class gives it.

    Raises:
        UnknownNameError: There is no such name and no such folder.
        CheckpointError: A file is missing, truncated or altered, or does not fit the class.
    """
    found = info(name_or_folder)
    state = _read_weights(found)
    model = _build(found)
    _fill(model, state, found.path / "model.safetensors")
    return model.eval()


def load_as(name_or_folder: str | Path, *classes: type[M]) -> M:
    """Load a checkpoint that must hold one of these classes.

    Args:
        name_or_folder: As for `load`.
        classes: What an application can use.

    Raises:
        ValueError: It holds something else; what `load` raises is raised too.
    """
    model = load(name_or_folder)
    if isinstance(model, classes):
        return model
    paths = {f"{klass.__module__}.{klass.__qualname__}" for klass in classes}
    fitting = [name for name in list_models() if info(name).class_path in paths]
    wanted = " or a ".join(klass.__name__ for klass in classes)
    hint = f", e.g. {fitting[0]}" if fitting else ""
    raise ValueError(f"{name_or_folder} holds a {type(model).__name__}; needed is a {wanted}{hint}.")


def save(
    model: "nn.Module",
    folder: str | Path,
    *,
    card: Card,
    golden_input: "Tensor | Sequence[Tensor] | None" = None,
    config: str | Mapping[str, Any] | None = None,
    dtype: "torch.dtype | None" = None,
    readme: str | None = None,
) -> Path:
    """Write a checkpoint that `load` accepts, whole or not at all.

    The constructor's arguments are read from attributes of the same names, so a class that is to be saved keeps each
    of them, unchanged and JSON-plain.

    Args:
        model: The model to write.
        folder: Where to; an existing checkpoint there is replaced once the new one is complete.
        card: What the checkpoint says about itself.
        golden_input: Positional input tensors whose output `verify` compares later.
        config: The YAML text, or its content, that `moe-zoo test` runs.
        dtype: Floating dtype to store parameters in, e.g. `torch.float16`. Buffers keep theirs.
        readme: A model card of your own instead of the generated one.

    Returns:
        The folder.

    Raises:
        ValueError: An argument cannot be stored, or `folder` holds files that are not a checkpoint's.
        PermissionError: `folder` cannot be written.
    """
    folder = Path(folder)
    init_args = _init_args(model)
    with _replacing(folder) as partial:
        weights = partial / "model.safetensors"
        _write_weights(model, weights, dtype)
        found = ModelInfo(
            name=folder.name,
            path=partial,
            class_path=f"{type(model).__module__}.{type(model).__qualname__}",
            init_args=init_args,
            card=card,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            size=weights.stat().st_size,
            sha256=_sha256(weights),
            versions=_versions(),
        )
        _write_metadata(found)
        _write_text(partial / "README.md", readme or _model_card(found))
        if config is not None:
            _write_text(partial / "config.yaml", config if isinstance(config, str) else _to_yaml(config))
        # Loading what was just written proves that it can be loaded, and golden outputs see the stored precision.
        stored = load(partial)
        if golden_input is not None:
            _write_golden(stored, partial / "golden.safetensors", golden_input)
    return folder


def update_metrics(
    name_or_folder: str | Path, metrics: Mapping[str, float], command: str, commit: str, seed: int | None = None
) -> None:
    """Renew numbers in the metadata and in the model card's tables; the weights are not touched.

    Args:
        name_or_folder: The checkpoint.
        metrics: The new numbers. They replace those of the same command, and the same numbers of any other.
        command: The command that made them.
        commit: The commit it ran on.
        seed: Its seed, where it has one.
    """
    found = info(name_or_folder)
    kept = [_without(old, metrics) for old in found.card.results if old.command != command]
    results = [*(old for old in kept if old.metrics), Result(dict(metrics), command, commit, seed)]
    readme = found.path / "README.md"
    text = _replace_metrics(readme.read_text("utf-8"), results, readme)
    _write_metadata(replace(found, card=replace(found.card, results=results)))
    _write_text(readme, text)


def recorded(name_or_folder: str | Path, keys: Collection[str]) -> list[dict[str, Any]]:
    """What a checkpoint's metadata say of other methods: `<method>/<metric>`, with the command that measured it.

    The name of a method has no slash.

    Args:
        name_or_folder: The checkpoint.
        keys: Metrics to look for.

    Returns:
        One row per method: `method`, marked as recorded, `command`, and its metrics.
    """
    rows: dict[str, dict[str, Any]] = {}
    for result in info(name_or_folder).card.results:
        for name, value in result.metrics.items():
            method, _, key = name.partition("/")
            if key in keys:
                row = rows.setdefault(method, {"method": f"{method}{RECORDED}", "command": result.command})
                row[key] = value
    return list(rows.values())


def verify(name_or_folder: str | Path) -> None:
    """Check a checkpoint as `load` does, and its golden output.

    Args:
        name_or_folder: The checkpoint.

    Raises:
        CheckpointError: Something is missing, altered, or differs by more than 1e-4.
    """
    import torch

    found = info(name_or_folder)
    model = load(name_or_folder)
    path = found.path / "golden.safetensors"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: fetch the checkpoint again, or save it with a golden_input.")
    golden = _read_tensors(path)
    inputs, expected = numbered(golden, "input"), numbered(golden, "output")
    outputs = _run(model, inputs)
    if len(outputs) != len(expected):
        raise CheckpointError(f"{path} holds {len(expected)} outputs, the model gives {len(outputs)}.")
    for index, (got, wanted) in enumerate(zip(outputs, expected, strict=True)):
        if got.shape != wanted.shape:
            raise CheckpointError(f"{path}: output.{index} is {_shape(wanted)}, the model gives {_shape(got)}.")
        if not torch.allclose(got.double(), wanted.double(), rtol=0, atol=GOLDEN_TOLERANCE, equal_nan=True):
            difference = (got.double() - wanted.double()).abs().max().item()
            raise CheckpointError(
                f"{path}: output.{index} differs by {difference:.3g} (allowed: {GOLDEN_TOLERANCE:g}), so the model no "
                "longer computes what it did when it was saved."
            )


def evaluate(name_or_folder: str | Path, data_root: str | Path | None = None) -> dict[str, float]:
    """Score a checkpoint by its own config: what `moe-zoo test NAME` prints.

    Args:
        name_or_folder: The checkpoint.
        data_root: The folder that holds `characters/`, `fusion/`, ...; else the config's or `MOE_ZOO_DATA`.
    """
    from zoo.cli import run

    data = [] if data_root is None else [f"--data.root={data_root}"]
    return run(["test", str(name_or_folder), *data])


# --- reading ---------------------------------------------------------------------------------------------------------


def _folder(name_or_folder: str | Path) -> Path:
    named = assets() / "checkpoints" / name_or_folder
    if isinstance(name_or_folder, str) and (named / "metadata.json").is_file():
        return named
    if Path(name_or_folder).is_dir():
        return Path(name_or_folder)
    raise UnknownNameError("checkpoint", name_or_folder, list_models(), "A folder written by zoo.save works too.")


def _parse(name: str, folder: Path, raw: dict[str, Any]) -> ModelInfo:
    where = folder / "metadata.json"
    if raw.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{where} has format version {raw.get('format_version')}, this moe-zoo reads {FORMAT_VERSION}: "
            "update moe-zoo or save the checkpoint again."
        )
    try:
        card = {**raw["card"], "results": [Result(**result) for result in raw["card"]["results"]]}
        values = {key: value for key, value in raw.items() if key not in ("format_version", "card")}
        return ModelInfo(name=name, path=folder, card=Card(**card), **values)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{where} does not describe a checkpoint ({error}): fetch it again.") from None


def _read_weights(found: ModelInfo) -> "dict[str, Tensor]":
    path = found.path / "model.safetensors"
    if path.is_file() and path.stat().st_size != found.size:
        raise CheckpointError(
            f"{path} is damaged: {path.stat().st_size} bytes, metadata.json says {found.size}. Fetch it again."
        )
    if path.is_file() and _sha256(path) != found.sha256:
        raise CheckpointError(f"{path} was altered: its sha256 is not the one in metadata.json. Fetch it again.")
    return _read_tensors(path)


def _read_tensors(path: Path) -> "dict[str, Tensor]":
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise CheckpointError(f"{path} is missing: fetch the checkpoint again.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error}): fetch it again.") from None


def _build(found: ModelInfo) -> "nn.Module":
    import torch
    from torch import nn

    try:
        model_class = pkgutil.resolve_name(found.class_path)
    except (ImportError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"Checkpoint {found.name!r} needs the class {found.class_path}, which cannot be imported ({error})."
        ) from None
    if not (isinstance(model_class, type) and issubclass(model_class, nn.Module)):
        raise CheckpointError(f"Checkpoint {found.name!r} names {found.class_path}, which is no torch.nn.Module.")
    try:
        # The initialisation is overwritten at once: it must not move the caller's random state.
        with torch.random.fork_rng(devices=[]):
            model: nn.Module = model_class(**found.init_args)
    except CheckpointError:
        # What it builds on is at fault, and the class has said how.
        raise
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"Checkpoint {found.name!r} does not fit {found.class_path} ({error}): it was written by another version "
            f"({found.versions})."
        ) from None
    return model


def _fill(model: "nn.Module", state: "dict[str, Tensor]", path: Path) -> None:
    target = model.state_dict()
    missing, extra = sorted(target.keys() - state.keys()), sorted(state.keys() - target.keys())
    if missing or extra:
        raise CheckpointError(
            f"{path} does not fit {type(model).__name__}: missing {_some(missing)}; not expected {_some(extra)}."
        )
    for key, wanted in target.items():
        found = state[key]
        castable = found.dtype == wanted.dtype or (found.is_floating_point() and wanted.is_floating_point())
        if found.shape != wanted.shape or not castable:
            raise CheckpointError(f"{path}: {key} is {_shape(found)}, {type(model).__name__} has {_shape(wanted)}.")
    model.load_state_dict(state, strict=True)


# --- writing ---------------------------------------------------------------------------------------------------------


def _init_args(model: "nn.Module") -> dict[str, Any]:
    name = type(model).__name__
    args = {}
    for parameter in list(inspect.signature(type(model).__init__).parameters.values())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ValueError(f"{name}.__init__ takes *{parameter.name}: name every argument, so that it can be stored.")
        if not hasattr(model, parameter.name):
            raise ValueError(
                f"{name}.__init__ takes {parameter.name!r} but keeps no attribute of that name: set "
                f"self.{parameter.name} = {parameter.name}, so that it can be stored."
            )
        args[parameter.name] = _plain(f"{name}.{parameter.name}", getattr(model, parameter.name))
    return args


def _plain(what: str, value: Any) -> Any:
    try:
        same = json.loads(json.dumps(value, allow_nan=False)) == value
    except (TypeError, ValueError):
        same = False
    if not same:
        raise ValueError(
            f"{what} is {type(value).__name__} {str(value)[:60]!r}, which JSON cannot hold: use int, float, str, bool, "
            "None, list or dict with string keys."
        )
    return value


def _write_weights(model: "nn.Module", path: Path, dtype: "torch.dtype | None") -> None:
    from safetensors.torch import save_file

    parameters = dict(model.named_parameters(remove_duplicate=False))
    state = {}
    for key, tensor in model.state_dict().items():
        cast = dtype is not None and key in parameters and tensor.is_floating_point()
        # A clone each: safetensors refuses tensors that share memory, which tied weights and views do.
        state[key] = tensor.detach().cpu().to(dtype if cast else tensor.dtype).contiguous().clone()
    save_file(state, path)


def _write_golden(model: "nn.Module", path: Path, golden_input: "Tensor | Sequence[Tensor]") -> None:
    import torch
    from safetensors.torch import save_file

    inputs = [golden_input] if isinstance(golden_input, torch.Tensor) else list(golden_input)
    tensors = {f"input.{index}": tensor for index, tensor in enumerate(inputs)}
    tensors |= {f"output.{index}": tensor for index, tensor in enumerate(_run(model, inputs))}
    save_file({key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}, path)


def _write_metadata(found: ModelInfo) -> None:
    content = {"format_version": FORMAT_VERSION, **asdict(found)}
    del content["name"], content["path"]
    _plain("card", content["card"])
    _write_text(found.path / "metadata.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, "utf-8")
    partial.replace(path)


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` that takes its place when the block ends without an error."""
    if folder.exists() and (others := {path.name for path in folder.iterdir()} - set(FILES)):
        raise ValueError(f"{folder} holds other files ({_some(sorted(others))}): choose a folder of its own.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise PermissionError(f"Cannot write the checkpoint {folder} ({error.strerror}): choose another.") from None
    try:
        partial = scratch / "new"
        partial.mkdir()
        yield partial
        if folder.exists():
            folder.rename(scratch / "old")
        partial.rename(folder)
    finally:
        if (scratch / "old").exists() and not folder.exists():
            (scratch / "old").rename(folder)
        shutil.rmtree(scratch)


# --- the model card --------------------------------------------------------------------------------------------------


def _model_card(found: ModelInfo) -> str:
    card = found.card
    facts = {
        "Task": card.task,
        "Data": card.data,
        "Terms of the data": card.data_terms,
        "Licence of the weights": card.weights_licence,
        "Class": f"`{found.class_path}`",
        "Parameters": f"{found.parameters:,} ({found.size:,} bytes)",
        "Preprocessing": f"`{json.dumps(card.preprocessing)}`" if card.preprocessing else "none",
    }
    lines = [f"# {card.title}", "", card.description, ""]
    lines += [f"**Did the mixture pay?** {card.verdict}", ""] if card.verdict else []
    lines += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items()), "", "## Results", ""]
    return "\n".join([*lines, _metrics_section(card.results)]) + "\n"


def _metrics_section(results: Iterable[Result]) -> str:
    lines = [_METRICS_BEGIN]
    for result in results:
        seed = "" if result.seed is None else f", seed {result.seed}"
        lines += [f"`{result.command}` at commit `{result.commit}`{seed}:", "", "| metric | value |", "|---|---:|"]
        lines += [*(f"| {key} | {value:.5g} |" for key, value in result.metrics.items()), ""]
    return "\n".join([*lines, _METRICS_END])


def _replace_metrics(text: str, results: Iterable[Result], path: Path) -> str:
    before, begin, rest = text.partition(_METRICS_BEGIN)
    _, end, after = rest.partition(_METRICS_END)
    if not (begin and end):
        raise ValueError(f"{path} has no place for results: add the lines {_METRICS_BEGIN} and {_METRICS_END}.")
    return before + _metrics_section(results) + after


# --- small things ----------------------------------------------------------------------------------------------------


def _run(model: "nn.Module", inputs: "Sequence[Tensor]") -> "list[Tensor]":
    import torch

    with torch.no_grad():
        output = model(*inputs)
    if isinstance(output, torch.Tensor):
        return [output]
    outputs = list(output.values() if isinstance(output, Mapping) else output)
    if not all(isinstance(tensor, torch.Tensor) for tensor in outputs):
        raise ValueError(f"{type(model).__name__} returns more than tensors, so it can have no golden output.")
    return outputs


def numbered(tensors: "Mapping[str, Tensor]", prefix: str) -> "list[Tensor]":
    """The tensors `prefix.0`, `prefix.1`, ... in the order of their numbers."""
    count = sum(key.startswith(prefix + ".") for key in tensors)
    return [tensors[f"{prefix}.{index}"] for index in range(count)]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5]) + (f", ... ({len(names)} in all)" if len(names) > 5 else "")
    return shown or "nothing"


def _shape(tensor: "Tensor") -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _without(result: Result, metrics: Mapping[str, float]) -> Result:
    return replace(result, metrics={key: value for key, value in result.metrics.items() if key not in metrics})


def _versions() -> dict[str, str]:
    import torch

    from zoo import __version__

    return {"moe-zoo": __version__, "torch": torch.__version__, "python": platform.python_version()}


def _to_yaml(content: Mapping[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(dict(content), sort_keys=False))
