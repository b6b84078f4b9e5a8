"""What is written, what is refused, and that nothing half is left behind."""

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command_line import sentence
from safetensors.torch import save_file
from torch import nn
from toys import CARD, Toy

import zoo
from zoo import hub
from zoo.cli import main
from zoo.export import (
    MAX_BATCH,
    RUNTIMES,
    Exported,
    Runtime,
    compare,
    export,
    golden_inputs,
    parity_inputs,
    random_like,
    trace,
    trace_batches,
    training_path,
)
from zoo.moe import GroupedExperts, MoELayer, TopKRouter


class Mixture(nn.Module):
    """A mixture that runs sparse, and dense once it is exported."""

    def __init__(self, dim: int = 4) -> None:
        super().__init__()
        self.dim = dim
        self.layer = MoELayer(TopKRouter(dim, 4, 2), GroupedExperts(4, dim, 8))

    def forward(self, x):
        return self.layer(x)


class Stubborn(nn.Module):
    """A model whose path depends on its data, which nothing can export."""

    def __init__(self, dim: int = 4) -> None:
        super().__init__()
        self.dim = dim
        self.linear = nn.Linear(dim, 2)

    def forward(self, x):
        return self.linear(x) if x.sum() > 0 else self.linear(-x)


class OneSize(Stubborn):
    """A model that was written for batches of five."""

    def forward(self, x):
        return self.linear(x.reshape(5, self.dim))


MODELS = {"toy": Toy, "mixture": Mixture, "stubborn": Stubborn, "one-size": OneSize}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a checkpoint of each model in it."""
    for name, build in MODELS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            zoo.save(build(), tmp_path / name, card=CARD, golden_input=torch.randn(5, 4))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def runtime(monkeypatch):
    """torch.export's own programs in place of another runtime's, so that all around it is tested without one."""
    programs = {}

    def write(traced, path):
        programs[path] = traced.program.module()
        path.write_bytes(b"a program")

    monkeypatch.setitem(
        RUNTIMES, "onnx", Runtime(write, lambda path: lambda x: [programs[path](*x)], lambda *_: None, 0)
    )
    monkeypatch.setattr("zoo.export.PACKAGES", {"onnx": (), "executorch": ()})


def left_in(folder):
    return {path.name for path in folder.iterdir()} - set(MODELS)


# --- around any runtime ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["toy", "mixture"])
def test_a_checkpoint_is_written_and_compared(name, here, runtime, capsys):
    done = export(name, "onnx", "x.onnx")
    assert done.files == [Path("x.onnx")] and done.batch == "any" and done.difference < 1e-6
    assert left_in(here) == {"x.onnx"}
    main(["export", name, "--format", "onnx", "--output", "y.onnx"])
    printed = capsys.readouterr().out
    assert "y.onnx" in printed and "Largest difference from PyTorch" in printed


def test_a_batch_size_that_cannot_vary_says_why(here, runtime):
    done = export("one-size", "onnx", "x.onnx")
    assert done.batch.startswith("5 only (") and len(done.batch) > len("5 only ()")


def test_nothing_is_left_of_an_export_that_fails(here, runtime, monkeypatch, capsys):
    run = RUNTIMES["onnx"].load
    wrong = Runtime(RUNTIMES["onnx"].write, lambda path: lambda inputs: [run(path)(inputs)[0] + 1e-3], None, 0)
    monkeypatch.setitem(RUNTIMES, "onnx", wrong)
    line = sentence(capsys, "export", "toy", "--format", "onnx", "--output", "x.onnx")
    assert "toy: output 0 differs from PyTorch by 0.001" in line and "nothing was written" in line
    assert left_in(here) == set()


def test_what_an_exporter_raises_becomes_a_sentence(here, runtime, monkeypatch, capsys):
    def write(traced, path):
        path.write_bytes(b"half")
        raise RuntimeError("a pass failed") from AssertionError("no such layout\nand more")

    monkeypatch.setitem(RUNTIMES, "onnx", Runtime(write, None, None, 0))
    line = sentence(capsys, "export", "toy", "--format", "onnx", "--output", "x.onnx")
    assert line == "moe-zoo: toy cannot be exported to onnx: no such layout"
    assert left_in(here) == set()


def test_a_model_that_cannot_be_exported(here, runtime, capsys):
    line = sentence(capsys, "export", "stubborn", "--format", "onnx", "--output", "x.onnx")
    assert "stubborn cannot be exported by torch.export: " in line
    assert left_in(here) == set()


def test_files_that_are_there_and_folders_that_are_not(here, runtime, capsys):
    (here / "x.onnx").write_text("mine")
    line = sentence(capsys, "export", "toy", "--format", "onnx", "--output", "x.onnx")
    assert "x.onnx is already there: remove it, or choose another --output" in line
    assert (here / "x.onnx").read_text() == "mine"
    line = sentence(capsys, "export", "toy", "--format", "onnx", "--output", "no/x.onnx")
    assert "There is no folder no to write x.onnx in" in line
    (here / "y.training.pte").touch()
    line = sentence(capsys, "export", "toy", "--format", "executorch", "--trainable", "--output", "y.pte")
    assert "y.training.pte is already there" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--format", "onxx"), "Unknown format 'onxx'. Did you mean 'onnx'?"),
        (("--format", "onnx", "--trainable"), "use --format executorch --trainable"),
        (("--format", "executorch", "--trainable", "--int8"), "choose --trainable or --int8"),
        (("--format", "onnx", "--int8"), "int8 is not offered for Toy"),
    ],
)
def test_options_that_do_not_go_together(options, message, here, runtime, monkeypatch, capsys):
    assert message in sentence(capsys, "export", "toy", "--output", "x", *options)
    assert left_in(here) == set()


@pytest.mark.parametrize(
    ("format", "missing"), [("onnx", "onnx, onnxscript, onnxruntime"), ("executorch", "executorch")]
)
def test_what_is_not_installed(format, missing, here, monkeypatch, capsys):
    monkeypatch.setattr("zoo.export.importlib.util.find_spec", lambda name: None)
    line = sentence(capsys, "export", "toy", "--format", format, "--output", "x")
    assert f"Exporting to {format} needs {missing}, not installed here: pip install 'moe-zoo[export]'." in line


def test_unknown_checkpoint_and_one_without_a_golden_input(here, runtime, capsys):
    assert "Unknown checkpoint 'toi'" in sentence(capsys, "export", "toi", "--format", "onnx", "--output", "x")
    (here / "toy/golden.safetensors").unlink()
    assert "golden.safetensors is missing" in sentence(capsys, "export", "toy", "--format", "onnx", "--output", "x")


def test_tracing_leaves_out_buffers_that_nothing_reads():
    model = Toy().eval()
    program = trace(model, (torch.randn(2, 4),), None)
    sizes = {name: value.numel() for name, value in program.state_dict.items()}
    assert sizes == {"linear.weight": 8, "linear.bias": 2, "count": 0, "scale": 4}
    assert model.count.numel() == 3, "the model itself stays as it is"


def test_golden_inputs_come_in_the_order_of_their_numbers(here, monkeypatch):
    tensors = {f"input.{number}": torch.full((1,), float(number)) for number in range(11)}
    save_file(tensors | {"output.0": torch.zeros(1)}, here / "golden.safetensors")
    monkeypatch.setattr("zoo.hub.info", lambda name: SimpleNamespace(path=here))
    assert torch.cat(golden_inputs("x")).tolist() == list(range(11))


def test_inputs_of_the_comparison():
    golden = [torch.tensor([[-2.0, 6.0], [float("nan"), 1.0]]), torch.tensor([[3], [5]])]
    model = nn.Linear(2, 1)
    fixed = trace_batches("x", model, golden[:1], 0)
    first, *noise = parity_inputs(golden, fixed)
    torch.testing.assert_close(first[0], golden[0], equal_nan=True)
    assert [len(batch[0]) for batch in noise] == [2, 1, 3]
    for floats, integers in noise:
        assert floats.min() >= -2 and floats.max() <= 6 and floats.isfinite().all()
        assert integers.dtype == torch.int64 and set(integers.flatten().tolist()) <= {3, 4, 5}
    many = random_like(torch.tensor([0.0, 1.0]).repeat(500), torch.Generator().manual_seed(0))
    assert many.mean().item() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("wrong", [torch.full((2,), 2e-5), torch.full((2,), float("nan")), torch.zeros(3)])
def test_a_comparison_that_must_fail(wrong):
    with pytest.raises(ValueError, match="x: output 0"):
        compare("x", lambda x: torch.zeros(2), lambda inputs: [wrong], [[torch.zeros(2)]])


def test_a_comparison_is_relative_to_large_outputs():
    large = torch.tensor([100.0, 1.0])
    assert compare("x", lambda x: large, lambda inputs: [large + 5e-4], [[large]]) == pytest.approx(5e-4, rel=0.1)
    assert compare("x", lambda x: large[:0], lambda inputs: [large[:0]], [[large]]) == 0


def test_where_the_training_program_goes():
    assert training_path(Path("a/x.pte")) == Path("a/x.training.pte")


# --- in the runtimes themselves --------------------------------------------------------------------------------------


@pytest.fixture
def onnx():
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="needs the extra export")


@pytest.fixture
def executorch():
    pytest.importorskip("executorch", reason="needs the extra export")


@pytest.mark.parametrize("name", ["toy", "mixture"])
def test_onnx(name, onnx, here):
    import onnx as format
    import onnxruntime

    done = export(name, "onnx", "x.onnx")
    assert done.batch == "any" and 0 <= done.difference < 1e-5
    session = onnxruntime.InferenceSession("x.onnx", providers=["CPUExecutionProvider"])
    (value,) = session.get_inputs()
    assert value.shape == ["batch", 4]
    x = torch.randn(17, 4)
    (got,) = session.run(None, {value.name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), hub.load(name)(x).detach(), atol=1e-5, rtol=1e-5)
    text = Path("x.onnx").read_bytes()
    assert str(Path(zoo.__file__).parents[1]).encode() not in text, "no path of the machine that wrote it"
    assert not format.load("x.onnx").graph.node[0].metadata_props


@pytest.mark.parametrize("name", ["toy", "mixture"])
def test_executorch(name, executorch, here):
    done = export(name, "executorch", "x.pte")
    assert done.batch == f"1..{MAX_BATCH}" and 0 <= done.difference < 1e-5
    x = torch.randn(MAX_BATCH, 4)
    (got,) = RUNTIMES["executorch"].load(Path("x.pte"))([x])
    torch.testing.assert_close(got, hub.load(name)(x).detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("format", ["onnx", "executorch"])
def test_int8(format, request, tmp_path, monkeypatch, capsys):
    request.getfixturevalue(format)
    monkeypatch.delenv("MOE_ZOO_DATA", raising=False)
    name = "customization/lenet5-emnist"
    whole: Exported = export(name, format, tmp_path / "float")
    main(["export", name, "--format", format, "--int8", "--output", str(tmp_path / "int8")])
    printed = capsys.readouterr().out
    assert "characters in stroke fonts (synthetic)" in printed
    numbers = {
        cells[1].strip(): float(cells[2])
        for cells in (line.split("│") for line in printed.splitlines())
        if len(cells) == 4 and cells[1].strip() in ("accuracy, float32", "accuracy, int8", "same answer")
    }
    assert numbers["accuracy, int8"] > numbers["accuracy, float32"] - 2 and numbers["accuracy, float32"] > 50
    assert 95 < numbers["same answer"] < 100, "it is quantised, and little else"
    assert (tmp_path / "int8").stat().st_size < 0.7 * whole.files[0].stat().st_size
