"""Learning on a device: the same weights as PyTorch's SGD, without autograd or a module of torch.nn."""

import copy
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from handwriting import write_class_folders
from safetensors.torch import load_file
from torch import Tensor

from tasks.customization import on_device
from tasks.customization.customizer import (
    Learned,
    Recipe,
    TorchBackend,
    TorchLearner,
    customize,
    expert_loss,
    gate_loss,
    keep,
    learn,
)
from tasks.customization.data import Samples, write_all_classes
from tasks.customization.model import CustomizedLeNet
from tasks.customization.on_device import DeviceBackend, DeviceLearner, customize_on_device
from tasks.customization.programs import (
    Classify,
    device_programs,
    expert_method,
    gate_method,
    reference_data,
    state_of,
    without_replay,
)
from zoo import hub
from zoo.errors import DataNotFoundError
from zoo.export import Method, export, training_path

QUICK = Recipe(expert_steps=60, gate_steps=60, copies=1)
CHECKPOINT = "customization/lenet5-emnist"
Writer = tuple[Tensor, Tensor]


# --- without the runtime ---------------------------------------------------------------------------------------------


class Autograd:
    """What a training program of the runtime does, by autograd: the tests of the arithmetic need no runtime."""

    def __init__(self, method: Method) -> None:
        self.module = copy.deepcopy(method.module)
        self.parameters = list(self.module.parameters())

    def forward_backward(self, name: str, inputs: list[Tensor]) -> list[Tensor]:
        count = len(inputs) - len(self.parameters)
        with torch.enable_grad():
            outputs = self.module(tuple(inputs[:count]), tuple(inputs[count:]))
            self.gradients = torch.autograd.grad(outputs[0], self.parameters)
        return [output.detach() for output in outputs]

    def named_parameters(self) -> dict[str, Tensor]:
        return {str(index): parameter.data for index, parameter in enumerate(self.parameters)}

    def named_gradients(self) -> dict[str, Tensor]:
        return {str(index): gradient for index, gradient in enumerate(self.gradients)}


class PlainSGD:
    """The runtime's SGD without options: parameters minus rate times gradients."""

    def __init__(self, values: dict[str, Tensor], rate: float) -> None:
        self.values, self.rate = values, rate

    def step(self, gradients: dict[str, Tensor]) -> None:
        for name, value in self.values.items():
            value.sub_(self.rate * gradients[name])


@pytest.mark.parametrize("which", ["expert", "gate"])
def test_steps_without_momentum_of_a_loss_with_velocity_are_those_of_sgd_with_momentum(
    which: str, model: CustomizedLeNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(weight_decay=0.05)
    method = (expert_method if which == "expert" else gate_method)(model, recipe)
    batch, velocity = method.inputs
    start = [0.1 * torch.randn(value.shape) for value in velocity]
    reference = TorchLearner(
        gate_loss if which == "gate" else lambda values, batch: expert_loss(values, batch, recipe.replay_weight), recipe
    )
    ours = object.__new__(DeviceLearner)
    ours.program, ours.method = Autograd(method), which
    monkeypatch.setattr(on_device, "new_sgd", PlainSGD)
    for learner in (reference, ours):
        learner.begin(start)
    for rate in (0.001, 0.002, 0.003, 0.002, 0.0005):
        assert ours.step(batch, rate) == pytest.approx(reference.step(batch, rate), rel=1e-5)
    for value, wanted, first in zip(ours.parameters(), reference.parameters(), start, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(value, first, atol=1e-4)
    ours.begin(start)
    reference.begin(start)
    assert ours.step(batch, 0.01) == pytest.approx(reference.step(batch, 0.01), rel=1e-5), "a fresh start"


def test_one_program_serves_everybody(model: CustomizedLeNet, writer: Writer) -> None:
    images, _ = writer
    customised = customize(model, *writer, recipe=QUICK)
    customised.threshold.fill_(0.5)
    program = Classify(without_replay(model))
    logits, expert = program(images, *state_of(customised))
    wanted, routing = customised(images, return_routing=True)
    torch.testing.assert_close(logits, wanted)
    assert torch.equal(expert, routing.expert_index[:, 0]) and 0 < expert.sum() < len(expert)
    assert torch.equal(program(images, *state_of(model))[0], model(images)), "the model itself stays as it is"
    assert len(model.replay_labels) == 62


def test_what_was_learned_is_what_customize_keeps(model: CustomizedLeNet, writer: Writer) -> None:
    customised = customize(model, *writer, recipe=QUICK)
    with torch.no_grad():
        learned = learn(TorchBackend(model), *writer, recipe=QUICK)
    for name, value in zip((field.name for field in fields(Learned)), state_of(customised), strict=True):
        assert torch.equal(getattr(learned, name), value), name
    again = copy.deepcopy(model)
    keep(again, learned)
    assert all(map(torch.equal, again.state_dict().values(), customised.state_dict().values()))


def test_all_methods_run(model: CustomizedLeNet) -> None:
    programs = device_programs(model)
    assert set(programs.inference) == {"forward", "features"}
    assert set(programs.training) == {"expert", "gate", "warp", "replay"}
    for method in (*programs.inference.values(), *programs.training.values()):
        outputs = method.module(*method.inputs)
        assert all(tensor.isfinite().all() for tensor in (outputs if isinstance(outputs, tuple) else (outputs,)))
    assert programs.constants["folds"] == 4 and programs.constants["rank"] == model.rank


def test_reference_data_without_a_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOE_ZOO_DATA", raising=False)
    data = reference_data()
    assert "synthetic" in data.source and data.calibration[0].shape[1:] == (1, 28, 28)
    with torch.no_grad():
        logits = hub.load(CHECKPOINT)(data.inputs[0])
    assert 50 < data.score(logits) < 100 and data.score(logits[:64]) > 0


def test_the_runtime_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs executorch, not installed here: pip install 'moe-zoo\[export\]'"):
        DeviceBackend("x.pte")


# --- in the runtime --------------------------------------------------------------------------------------------------


# Writing the programs takes a minute of a quiet core.
IN_THE_RUNTIME = pytest.mark.timeout(900)


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped checkpoint's programs."""
    pytest.importorskip("executorch", reason="needs the extra export")
    path = tmp_path_factory.mktemp("programs") / "lenet5.pte"
    done = export(CHECKPOINT, "executorch", path, trainable=True)
    assert done.files == [path, training_path(path)] and done.difference < 1e-4
    return path


def split(writer: Writer) -> tuple[Writer, Writer]:
    images, labels = writer
    held_out = torch.arange(len(labels)) % 4 == 0
    return (images[~held_out], labels[~held_out]), (images[held_out], labels[held_out])


class Remembering:
    """A backend whose learners can be looked at afterwards."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.learners: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def expert_learner(self, recipe: Recipe) -> Any:
        self.learners.append(self.backend.expert_learner(recipe))
        return self.learners[-1]

    def gate_learner(self, recipe: Recipe) -> Any:
        self.learners.append(self.backend.gate_learner(recipe))
        return self.learners[-1]


@IN_THE_RUNTIME
def test_the_runtime_learns_what_pytorch_learns(
    programs: Path, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, (test_images, test_labels) = split(writer)
    reference = copy.deepcopy(hub.load(CHECKPOINT))
    by_torch = Remembering(TorchBackend(reference))
    with torch.no_grad():
        keep(reference, learn(by_torch, *own))
        wanted = reference(test_images)
        before = (hub.load(CHECKPOINT)(test_images).argmax(1) == test_labels).float().mean()

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("autograd or torch.nn took part")

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "__call__", forbidden)
        patch.setattr(torch.Tensor, "backward", forbidden)
        patch.setattr(torch.autograd, "grad", forbidden)
        patch.setattr(torch.optim.SGD, "step", forbidden)
        for name, function in list(vars(torch.nn.functional).items()):
            if callable(function) and not name.startswith("_"):
                patch.setattr(torch.nn.functional, name, forbidden)
        backend = DeviceBackend(programs)
        by_runtime = Remembering(backend)
        learned = customize_on_device(by_runtime, *own)
        logits, expert = backend.classify(test_images, learned)
    for ours, theirs in zip(by_runtime.learners, by_torch.learners, strict=True):
        for value, target in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(value, target, rtol=0, atol=1e-4)
    for name, value in zip((field.name for field in fields(Learned)), state_of(reference), strict=True):
        # Undoing the standardisation divides differences by standard deviations of down to 0.01.
        torch.testing.assert_close(getattr(learned, name), value, rtol=1e-4, atol=3e-3, msg=name)
    assert learned.threshold < 1 and expert.sum() > 0
    assert torch.equal(logits.argmax(1), wanted.argmax(1))
    assert (logits.argmax(1) == test_labels).float().mean() > before + 0.1


@IN_THE_RUNTIME
def test_the_runtime_lowers_a_rate_that_diverges(programs: Path, writer: Writer) -> None:
    recipe = replace(QUICK, expert_rate=30.0)
    learned = customize_on_device(DeviceBackend(programs), *writer, recipe=recipe)
    assert all(getattr(learned, field.name).isfinite().all() for field in fields(Learned))
    with pytest.raises(ValueError, match="local expert diverged even at"):
        customize_on_device(DeviceBackend(programs), *writer, recipe=replace(QUICK, expert_rate=1e9))


@IN_THE_RUNTIME
def test_a_recipe_that_the_program_was_not_built_for(programs: Path, writer: Writer) -> None:
    with pytest.raises(ValueError, match="The recipe has folds=3, the training program was exported for 4"):
        customize_on_device(DeviceBackend(programs), *writer, recipe=replace(QUICK, folds=3))


@IN_THE_RUNTIME
def test_samples_that_nothing_can_be_learned_from(programs: Path) -> None:
    with pytest.raises(ValueError, match="There are 3 samples; customization needs at least 4"):
        customize_on_device(DeviceBackend(programs), torch.rand(3, 1, 28, 28), torch.tensor([0, 1, 2]))


@IN_THE_RUNTIME
def test_the_command(programs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = write_all_classes(7, 4)
    write_class_folders(tmp_path / "me", Samples(samples.images, samples.labels))
    output = tmp_path / "learned.safetensors"
    on_device.main(["--program", str(programs), "--samples", str(tmp_path / "me"), "--output", str(output)])
    printed = capsys.readouterr().out
    assert "me: accuracy on samples that were held back" in printed
    customised = hub.load(CHECKPOINT)
    keep(customised, Learned(**load_file(output)))
    assert 0 < customised.threshold < 1 and customised.local_expert.up.abs().sum() > 0


@IN_THE_RUNTIME
def test_files_that_are_no_programs(programs: Path, tmp_path: Path) -> None:
    with pytest.raises(DataNotFoundError, match="Could not find the program"):
        DeviceBackend(tmp_path / "none.pte")
    (tmp_path / "bad.pte").write_bytes(b"no program" * 100)
    with pytest.raises(ValueError, match=r"bad\.pte is no program of this ExecuTorch"):
        DeviceBackend(tmp_path / "bad.pte")
    with pytest.raises(ValueError, match="has no method features, forward: it takes a program exported with"):
        DeviceBackend(training_path(programs), programs)
