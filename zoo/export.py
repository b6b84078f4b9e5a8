"""Export: a checkpoint as a file that ONNX Runtime or ExecuTorch runs without PyTorch, checked before it is kept.

A file appears whole or not at all, and only after a runtime has given from it what PyTorch gives. Mixtures are exported
dense: all experts run, and each unit picks its own (`zoo.moe.experts.runs_dense`).

What goes beyond one call of a model is the application's to say, in a module `programs` beside the model's own:
`device_programs(model)` for models that can learn on a device, `reference_data()` for int8.
"""

import copy
import importlib
import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zoo import hub
from zoo.errors import CheckpointError, UnknownNameError

if TYPE_CHECKING:
    from torch.export import ExportedProgram

# What each format needs, and its usual suffix.
PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "executorch": ("executorch",)}
INSTALL = "pip install 'moe-zoo[export]'"
# Allowed difference from PyTorch, as a share of the largest output (of 1 where that is smaller).
TOLERANCE = 1e-5
# ExecuTorch plans the memory of the largest batch ahead.
MAX_BATCH = 64
# Of onnx: what int8 touches. All else, the gates' statistics among it, stays in floating point.
QUANTISED = ["Conv", "Gemm", "MatMul"]

Runner = Callable[[Sequence[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Exported:
    """What was written, and how it compares.

    Attributes:
        files: The file asked for first.
        batch: `any`, `1..n`, or the only batch size that it takes and why.
        difference: Largest absolute difference from PyTorch in float32, over golden and random inputs.
        metrics: Of int8: the score of both in percent, and how often they agree.
        source: Of int8: what these were measured on.
    """

    files: list[Path]
    batch: str
    difference: float
    metrics: dict[str, float] = field(default_factory=dict)
    source: str = ""


@dataclass(frozen=True)
class Method:
    """One entry point of a program for a device.

    Attributes:
        module: What it computes.
        inputs: An example, on which the program is compared with the module too.
        dynamic_shapes: As `torch.export.export` takes them.
        learns: Whether the program also returns the gradients of the first output with respect to all parameters.
    """

    module: nn.Module
    inputs: tuple[Any, ...] = ()
    dynamic_shapes: Any = None
    learns: bool = False


@dataclass(frozen=True)
class DevicePrograms:
    """What a device needs to use a model and to teach it.

    Attributes:
        inference: Methods of the inference program by name.
        training: Methods of the training program by name.
        constants: Numbers that the training program hands out by name: what it was built for.
    """

    inference: dict[str, Method]
    training: dict[str, Method]
    constants: dict[str, int | float]


@dataclass(frozen=True)
class ReferenceData:
    """What an int8 model is calibrated on and scored on.

    Attributes:
        source: In words.
        calibration: Inputs, each `(N, ...)`.
        inputs: Inputs of the score, each `(M, ...)`.
        metric: Its name.
        score: From the first output `(M, ...)` to percent.
    """

    source: str
    calibration: tuple[Tensor, ...]
    inputs: tuple[Tensor, ...]
    metric: str
    score: Callable[[Tensor], float]


def export(
    name_or_folder: str | Path,
    format: str,
    output: str | Path,
    *,
    trainable: bool = False,
    int8: bool = False,
) -> Exported:
    """Write a checkpoint for another runtime, and compare what that gives from the file with PyTorch.

    Args:
        name_or_folder: A name of `list_models()`, or a folder written by `save`.
        format: `onnx` or `executorch`.
        output: File to write; its folder must exist, the file itself must not.
        trainable: Of `executorch`: write an inference program that takes what was learned as inputs and, beside it, a
            training program (`training_path`) with which a device learns.
        int8: Quantise convolutions and matrix products, weights and activations, statically.

    Raises:
        UnknownNameError: No such format, or no such checkpoint.
        FileExistsError: The file is already there.
        FileNotFoundError: Its folder is not.
        ValueError: A package is missing, these options do not go together, or the model cannot be exported.
    """
    output = Path(output)
    files = [output, training_path(output)] if trainable else [output]
    check_options(format, trainable, int8)
    check_files(files)
    check_packages(format)
    model = hub.load(name_or_folder)
    with _quiet(), _explained(f"{name_or_folder} cannot be exported to {format}"), _appearing(files) as partial:
        if trainable:
            return write_trainable(str(name_or_folder), model, files, partial)
        inputs = golden_inputs(name_or_folder)
        data = hook(model, "reference_data", "int8")() if int8 else None
        runtime = RUNTIMES[format]
        traced = trace_batches(str(name_or_folder), model, inputs, runtime.max_batch)
        runtime.write(traced, partial[0])
        difference = compare(str(name_or_folder), model, runtime.load(partial[0]), parity_inputs(inputs, traced))
        if data is None:
            return Exported(files, traced.batch, difference)
        runtime.quantise(traced, partial[0], data.calibration)
        scores = score_int8(model, runtime.load(partial[0]), data, traced)
        source = f"{rows_scored(data, traced)} {data.source}"
        return Exported(files, traced.batch, difference, scores, source)


def training_path(output: Path) -> Path:
    """Where the training program goes: `x.training.pte` beside `x.pte`."""
    return output.with_name(f"{output.stem}.training{output.suffix}")


# --- what can be said before anything heavy --------------------------------------------------------------------------


def check_options(format: str, trainable: bool, int8: bool) -> None:
    """Raise a `ValueError` for an unknown format and for options that do not go together."""
    if format not in PACKAGES:
        raise UnknownNameError("format", format, PACKAGES)
    if trainable and format != "executorch":
        raise ValueError(f"A trainable {format} program does not exist here: use --format executorch --trainable.")
    if trainable and int8:
        raise ValueError("Learning needs floating-point weights: choose --trainable or --int8.")


def check_files(files: Sequence[Path]) -> None:
    """Raise for a folder that is missing and for files that are there."""
    folder = files[0].parent
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder} to write {files[0].name} in: make it first.")
    for file in files:
        if file.exists():
            raise FileExistsError(f"{file} is already there: remove it, or choose another --output.")


def check_packages(format: str) -> None:
    """Raise a `ValueError` that says what to install."""
    missing = [name for name in PACKAGES[format] if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"Exporting to {format} needs {', '.join(missing)}, not installed here: {INSTALL}.")


def golden_inputs(name_or_folder: str | Path) -> list[Tensor]:
    """The positional inputs of a checkpoint's golden output.

    Raises:
        CheckpointError: It has none.
    """
    from safetensors.torch import load_file

    path = hub.info(name_or_folder).path / "golden.safetensors"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing, which shows what the model takes: save it with a golden_input.")
    tensors = load_file(path)
    return hub.numbered(tensors, "input")


def hook(model: nn.Module, function: str, what: str) -> Callable[..., Any]:
    """A function of the module `programs` beside the model's.

    Raises:
        ValueError: The application has none.
    """
    package = type(model).__module__.rpartition(".")[0]
    name = f"{package}.programs"
    if not package or importlib.util.find_spec(name) is None:
        raise ValueError(f"{what} is not offered for {type(model).__name__}: its application has no {name}.")
    found: Callable[..., Any] = getattr(importlib.import_module(name), function)
    return found


# --- PyTorch's side --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traced:
    """A program of torch.export, and the batch sizes that it takes.

    Attributes:
        program: What the formats are written from.
        example: Its inputs.
        dynamic_shapes: Those it was traced with; None is a fixed batch.
        batch: As in `Exported`.
    """

    program: "ExportedProgram"
    example: tuple[Tensor, ...]
    dynamic_shapes: tuple[dict[int, Any], ...] | None
    batch: str

    @property
    def rows(self) -> int:
        """The fixed batch size, or that of the example."""
        return len(self.example[0])


def trace_batches(name: str, model: nn.Module, inputs: list[Tensor], max_batch: int) -> Traced:
    """Trace a model on its golden inputs, with a dynamic batch size where that can be.

    Args:
        name: For errors.
        model: In eval mode.
        inputs: Positional.
        max_batch: Largest batch, or 0 for any.

    Raises:
        ValueError: The model cannot be traced.
    """
    rows, why = len(inputs[0]), "inputs differ in their first dimension"
    if all(len(tensor) == rows for tensor in inputs):
        # A batch of 1 would be taken for a constant; and XNNPACK plans no more memory than the example needs.
        example = tuple(_rows(tensor, max_batch or max(rows, 2)) for tensor in inputs)
        shapes = tuple({0: _batch(max_batch)} for _ in inputs)
        try:
            return Traced(trace(model, example, shapes), example, shapes, f"1..{max_batch}" if max_batch else "any")
        except Exception as error:  # torch.export raises a dozen kinds
            why = _first_line(error)
    try:
        return Traced(trace(model, tuple(inputs), None), tuple(inputs), None, f"{rows} only ({why})")
    except Exception as error:
        raise ValueError(f"{name} cannot be exported by torch.export: {_first_line(error)}") from error


@torch.no_grad()
def trace(model: nn.Module, inputs: tuple[Any, ...], dynamic_shapes: Any) -> "ExportedProgram":
    """`torch.export`, without the buffers that the outputs do not depend on: a replay buffer is of no use there."""
    program = torch.export.export(model, inputs, dynamic_shapes=dynamic_shapes, strict=False)
    users = {node.name: node.users for node in program.graph.nodes if node.op == "placeholder"}
    buffers = program.graph_signature.inputs_to_buffers
    unused = [buffers[key] for key in buffers if not users[key] and model.get_buffer(buffers[key]).numel()]
    if not unused:
        return program
    slim = copy.deepcopy(model)
    for key in unused:
        owner, _, name = key.rpartition(".")
        setattr(slim.get_submodule(owner), name, model.get_buffer(key).flatten()[:0])
    return torch.export.export(slim, inputs, dynamic_shapes=dynamic_shapes, strict=False)


def parity_inputs(inputs: list[Tensor], traced: Traced) -> list[list[Tensor]]:
    """The golden inputs, and random ones of their range: as many, and one and three where the batch size is free."""
    rows = min(len(inputs[0]), MAX_BATCH)
    random = torch.Generator().manual_seed(0)
    sizes = [rows, 1, 3] if traced.dynamic_shapes else [rows]
    noise = [[random_like(_rows(tensor, size), random) for tensor in inputs] for size in sizes]
    return [[_rows(tensor, rows) for tensor in inputs], *noise]


def random_like(tensor: Tensor, random: torch.Generator) -> Tensor:
    """Uniform noise of a tensor's shape, dtype and range."""
    if not tensor.is_floating_point():
        low, high = int(tensor.min()), int(tensor.max())
        return torch.randint(low, high + 1, tensor.shape, generator=random).to(tensor.dtype)
    finite = tensor[tensor.isfinite()]
    noise = torch.rand(tensor.shape, generator=random, dtype=tensor.dtype)
    return noise * (finite.max() - finite.min()) + finite.min()


@torch.no_grad()
def compare(name: str, model: Callable[..., Any], run: Runner, batches: Sequence[Sequence[Any]]) -> float:
    """The largest absolute difference of a runtime's outputs from PyTorch's.

    Raises:
        ValueError: It is too large, or the outputs have other shapes.
    """
    largest = 0.0
    for inputs in batches:
        wanted = _tensors(model(*inputs))
        for index, (got, want) in enumerate(zip(run(inputs), wanted, strict=True)):
            if got.shape != want.shape:
                raise ValueError(f"{name}: output {index} is {tuple(got.shape)}, PyTorch gives {tuple(want.shape)}.")
            if not want.numel():
                continue
            difference = (got.double() - want.double()).abs().max().item()
            allowed = TOLERANCE * max(1.0, want.double().abs().max().item())
            # A difference that is not a number is not allowed either.
            if not difference <= allowed:
                raise ValueError(
                    f"{name}: output {index} differs from PyTorch by {difference:.3g} (allowed: {allowed:.3g}), so "
                    "nothing was written. Please report it."
                )
            largest = max(largest, difference)
    return largest


def rows_scored(data: ReferenceData, traced: Traced) -> int:
    """How many rows of the reference data are scored: whole batches where their size is fixed."""
    rows = len(data.inputs[0])
    return rows if traced.dynamic_shapes else rows // traced.rows * traced.rows


@torch.no_grad()
def score_int8(model: nn.Module, run: Runner, data: ReferenceData, traced: Traced) -> dict[str, float]:
    """Scores of both, and how often their first outputs have the same maximum, in percent."""
    size, rows = MAX_BATCH if traced.dynamic_shapes else traced.rows, rows_scored(data, traced)
    chunks = [[tensor[i : min(i + size, rows)] for tensor in data.inputs] for i in range(0, rows, size)]
    whole = torch.cat([_tensors(model(*chunk))[0] for chunk in chunks])
    small = torch.cat([run(chunk)[0] for chunk in chunks])
    return {
        f"{data.metric}, float32": data.score(whole),
        f"{data.metric}, int8": data.score(small),
        "same answer": 100 * (whole.argmax(1) == small.argmax(1)).float().mean().item(),
    }


# --- ONNX ------------------------------------------------------------------------------------------------------------


def write_onnx(traced: Traced, path: Path) -> None:
    """Write a program as ONNX, without the source lines and paths that the exporter notes on every node."""
    import onnx

    exported = torch.onnx.export(traced.program, dynamo=True, verbose=False)
    proto = exported.model_proto  # type: ignore[union-attr]
    for function in (proto.graph, *proto.functions):
        for part in (*function.node, *function.value_info, *getattr(function, "initializer", ())):
            part.ClearField("metadata_props")
            part.ClearField("doc_string")
    rename_batch(proto.graph)
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, path)


def rename_batch(graph: Any) -> None:
    """Call the first dimension of inputs and outputs `batch` where it is dynamic."""
    symbols = {value.type.tensor_type.shape.dim[0].dim_param for value in graph.input} - {""}
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in symbols:
                dim.dim_param = "batch"


def onnx_runner(path: Path) -> Runner:
    """ONNX Runtime on the CPU, one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return [torch.from_numpy(output) for output in session.run(None, feed)]

    return run


def quantise_onnx(traced: Traced, path: Path, calibration: Sequence[Tensor]) -> None:
    """Turn the float file at `path` into an int8 one: static, a scale per output channel of a weight."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    names = traced.program.graph_signature.user_inputs

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(list(zip(*(tensor.split(MAX_BATCH) for tensor in calibration), strict=True)))

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return (
                None
                if batch is None
                else {str(name): tensor.numpy() for name, tensor in zip(names, batch, strict=True)}
            )

    with tempfile.TemporaryDirectory() as scratch:
        small = Path(scratch) / "int8.onnx"
        quantize_static(
            path,
            small,
            Reader(),
            op_types_to_quantize=QUANTISED,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            # Signed weights would saturate the 16-bit sums of processors with AVX2 but no VNNI.
            weight_type=QuantType.QUInt8,
        )
        path.write_bytes(small.read_bytes())


# --- ExecuTorch ------------------------------------------------------------------------------------------------------


def write_executorch(traced: Traced, path: Path) -> None:
    """Write a program for ExecuTorch, its convolutions and products delegated to XNNPACK."""
    path.write_bytes(lower({"forward": traced.program}))


def lower(programs: Mapping[str, "ExportedProgram"]) -> bytes:
    """Lower programs to one file of as many methods, delegating to XNNPACK what it takes."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    lowered = to_edge_transform_and_lower(
        dict(programs),
        partitioner={name: [XnnpackPartitioner()] for name in programs},
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
    )
    buffer: bytes = lowered.to_executorch().buffer
    return buffer


def lower_training(programs: Mapping[str, "ExportedProgram"], constants: Mapping[str, int | float]) -> bytes:
    """Lower programs, forward-backward ones among them, to one file for ExecuTorch's own kernels.

    XNNPACK packs weights once and for all, which a step of SGD must be able to change.
    """
    from executorch.exir import EdgeCompileConfig, to_edge

    edge = to_edge(
        dict(programs),
        constant_methods=dict(constants),
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
    )
    buffer: bytes = edge.to_executorch().buffer
    return buffer


def executorch_runner(path: Path, method: str = "forward") -> Runner:
    """ExecuTorch's runtime on one method of a file."""
    from executorch.extension.pybindings.portable_lib import _load_for_executorch

    module = _load_for_executorch(str(path))

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        return list(module.run_method(method, list(_flatten(inputs))))

    return run


def quantise_executorch(traced: Traced, path: Path, calibration: Sequence[Tensor]) -> None:
    """Write a program for XNNPACK's int8 kernels, statically quantised, a scale per output channel of a weight."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantiser = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(traced.program.module(), quantiser)
    # The graph was traced on this size; what is left over would not fit a fixed one.
    for batch in zip(*(tensor.split(traced.rows) for tensor in calibration), strict=True):
        if len(batch[0]) == traced.rows:
            prepared(*batch)
    converted = torch.export.export(convert_pt2e(prepared), traced.example, dynamic_shapes=traced.dynamic_shapes)
    path.write_bytes(lower({"forward": converted}))


def write_trainable(name: str, model: nn.Module, files: list[Path], partial: list[Path]) -> Exported:
    """Write an inference and a training program, and compare every method with PyTorch, gradients with autograd."""
    programs: DevicePrograms = hook(model, "device_programs", "Learning on a device")(model)
    inference = {key: trace_method(method) for key, method in programs.inference.items()}
    training = {key: trace_method(method) for key, method in programs.training.items()}
    partial[0].write_bytes(lower(inference))
    partial[1].write_bytes(lower_training(training, programs.constants))
    differences = []
    for path, methods in zip(partial, (programs.inference, programs.training), strict=True):
        for key, method in methods.items():
            check = compare_gradients if method.learns else compare_method
            differences.append(check(f"{name}, method {key}", path, key, method))
    return Exported(files, f"1..{MAX_BATCH}", max(differences))


def trace_method(method: Method) -> "ExportedProgram":
    """Trace one entry point, with its backward where it learns."""
    from torch.export.experimental import _export_forward_backward

    if not method.learns:
        return trace(method.module, method.inputs, method.dynamic_shapes)
    program = torch.export.export(method.module, method.inputs, strict=False)
    return _export_forward_backward(program)


def compare_method(name: str, path: Path, key: str, method: Method) -> float:
    """As `compare`, for one method on its example."""
    return compare(name, method.module, executorch_runner(path, key), [method.inputs])


def compare_gradients(name: str, path: Path, key: str, method: Method) -> float:
    """As `compare`, for the outputs and the gradients of a method that learns."""
    from executorch.extension.training import _load_for_executorch_for_training

    program = _load_for_executorch_for_training(str(path))

    def run(inputs: Sequence[Any]) -> list[Tensor]:
        outputs = program.forward_backward(key, list(_flatten(inputs)))
        return [*outputs, *program.named_gradients().values()]

    def by_autograd(*inputs: Any) -> list[Tensor]:
        with torch.enable_grad():
            outputs = method.module(*inputs)
            gradients = torch.autograd.grad(outputs[0], list(method.module.parameters()))
        return [*(output.detach() for output in outputs), *gradients]

    return compare(name, by_autograd, run, [method.inputs])


@dataclass(frozen=True)
class Runtime:
    """What is known of a format.

    Attributes:
        write: Write a traced program to a file.
        load: A function that runs such a file.
        quantise: Write it, or what is written already, in int8.
        max_batch: The largest batch, 0 for any.
    """

    write: Callable[[Traced, Path], None]
    load: Callable[[Path], Runner]
    quantise: Callable[[Traced, Path, Sequence[Tensor]], None]
    max_batch: int


RUNTIMES = {
    "onnx": Runtime(write_onnx, onnx_runner, quantise_onnx, 0),
    "executorch": Runtime(write_executorch, executorch_runner, quantise_executorch, MAX_BATCH),
}


# --- small things ----------------------------------------------------------------------------------------------------


@contextmanager
def _appearing(files: Sequence[Path]) -> Iterator[list[Path]]:
    """Scratch files beside `files` that take their places when the block ends without an error."""
    with tempfile.TemporaryDirectory(prefix=".export-", dir=files[0].parent) as scratch:
        partial = [Path(scratch) / file.name for file in files]
        yield partial
        for path, file in zip(partial, files, strict=True):
            path.rename(file)


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn what an exporter or a runtime raises, of whatever kind, into one sentence."""
    try:
        yield
    except (ValueError, OSError):
        raise
    except Exception as error:
        raise ValueError(f"{what}: {_first_line(error.__cause__ or error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what the exporters' own packages warn of: experimental interfaces and each other's deprecations."""
    noisy = [logging.getLogger(name) for name in ("torch.utils._pytree", "root")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in noisy:
            logger.disabled = True
        try:
            yield
        finally:
            for logger in noisy:
                logger.disabled = False


def _batch(largest: int) -> Any:
    from torch.export import Dim

    return Dim("batch", min=1, max=largest) if largest else Dim.DYNAMIC


def _rows(tensor: Tensor, rows: int) -> Tensor:
    """So many rows, the tensor's own over and over."""
    return tensor[torch.arange(rows) % len(tensor)]


def _flatten(inputs: Sequence[Any]) -> Iterator[Tensor]:
    for value in inputs:
        if isinstance(value, Tensor):
            yield value
        else:
            yield from _flatten(value)


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return list(output.values() if isinstance(output, Mapping) else output)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
