"""Checkpoints: what is saved comes back, and what is damaged says so."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from toys import CARD, CONFIG, Toy

import zoo
from zoo import CheckpointError, Result, UnknownNameError, hub


@pytest.fixture
def model():
    model = Toy(dim=3, names=["a", "b"])
    model.count += 7
    return model


@pytest.fixture
def folder(model, tmp_path):
    return zoo.save(model, tmp_path / "toy" / "one", card=CARD, golden_input=torch.randn(5, 3), config=CONFIG)


@pytest.fixture
def named_zoo(folder, tmp_path, monkeypatch):
    for name in ("toy/ten10", "toy/ten9", "other/one"):
        shutil.copytree(folder, tmp_path / "checkpoints" / name)
    monkeypatch.setattr(hub, "assets", lambda: tmp_path)


def test_round_trip(model, folder):
    loaded = zoo.load(folder)
    assert not loaded.training
    assert loaded.names == ["a", "b"]
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[key])
        assert tensor.dtype == loaded.state_dict()[key].dtype
    assert {path.name for path in folder.iterdir()} == set(hub.FILES)
    zoo.verify(folder)


def test_a_class_can_be_asked_for(folder, named_zoo):
    assert isinstance(hub.load_as(folder, nn.Linear, Toy), Toy)
    with pytest.raises(ValueError, match=r"one holds a Toy; needed is a Linear or a Conv2d\.$"):
        hub.load_as(folder, nn.Linear, nn.Conv2d)
    zoo.save(nn.ReLU(), folder.parents[1] / "checkpoints/a/relu", card=CARD)
    with pytest.raises(ValueError, match=r"relu holds a ReLU; needed is a Toy, e\.g\. other/one\."):
        hub.load_as("a/relu", Toy)


def test_info(folder):
    info = zoo.info(folder)
    assert info.metrics == {"loss": 0.5, "other": 1.0}
    assert info.init_args == {"dim": 3, "names": ["a", "b"]}
    assert info.parameters == 8
    assert info.card == CARD
    json.dumps(info.to_dict())


def test_names_are_listed_in_natural_order(named_zoo):
    assert zoo.list_models() == ["other/one", "toy/ten9", "toy/ten10"]
    assert zoo.list_models("toy/*") == ["toy/ten9", "toy/ten10"]
    assert zoo.list_models("none/*") == []
    assert zoo.info("toy/ten9").name == "toy/ten9"
    zoo.verify("toy/ten9")


def test_parameters_are_stored_in_half_precision_and_buffers_are_not(model, tmp_path):
    folder = zoo.save(model, tmp_path / "half", card=CARD, dtype=torch.float16, golden_input=torch.randn(2, 3))
    stored = load_file(folder / "model.safetensors")
    assert stored["linear.weight"].dtype == torch.float16
    assert stored["scale"].dtype == torch.float32
    loaded = zoo.load(folder)
    assert loaded.linear.weight.dtype == torch.float32
    assert torch.equal(loaded.scale, model.scale)
    assert torch.equal(loaded.linear.weight, model.linear.weight.half().float())
    zoo.verify(folder)


def test_what_is_recorded_of_other_methods(folder):
    measured = {"lora-r64/average": 61.0, "lora-r64/mood/accuracy": 70.0, "average": 80.0, "lora-r64/n": 3.0}
    zoo.update_metrics(folder, measured, "python -m a.study", "1234567")
    zoo.update_metrics(folder, {"heads/average": 50.0}, "python -m another", "1234567")
    assert hub.recorded(folder, ["average", "mood/accuracy"]) == [
        {"method": "lora-r64 (recorded)", "command": "python -m a.study", "average": 61.0, "mood/accuracy": 70.0},
        {"method": "heads (recorded)", "command": "python -m another", "average": 50.0},
    ]
    assert hub.recorded(folder, ["f1"]) == []


def test_tied_weights_and_several_golden_inputs_and_outputs(tmp_path):
    folder = zoo.save(Tied(), tmp_path / "tied", card=CARD, golden_input=[torch.randn(2, 3), torch.randn(2, 3)])
    loaded = zoo.load(folder)
    assert loaded.first.weight is loaded.second.weight
    zoo.verify(folder)


def test_loading_leaves_the_random_state_alone(folder):
    before = torch.get_rng_state()
    zoo.load(folder)
    assert torch.equal(before, torch.get_rng_state())


def test_new_metrics_replace_the_old_and_leave_the_weights(folder):
    weights = (folder / "model.safetensors").read_bytes()
    zoo.update_metrics(folder, {"other": 2.0}, "a study", "1111111", seed=3)
    assert zoo.info(folder).card.results == [
        Result({"loss": 0.5}, "moe-zoo test toy/one", "0000000", 0),
        Result({"other": 2.0}, "a study", "1111111", 3),
    ]
    zoo.update_metrics(folder, {"loss": 0.25}, "moe-zoo test toy/one", "2222222")
    assert zoo.info(folder).metrics == {"other": 2.0, "loss": 0.25}
    card = (folder / "README.md").read_text()
    assert "| loss | 0.25 |" in card
    assert "0000000" not in card
    assert card.count("<!-- metrics -->") == 1
    assert (folder / "model.safetensors").read_bytes() == weights


def test_the_card_tells_data_terms_licence_and_command(folder):
    card = (folder / "README.md").read_text()
    for part in (
        "# A toy",
        "seeded noise (synthetic)",
        "Apache-2.0",
        "`moe-zoo test toy/one` at commit `0000000`, seed 0",
    ):
        assert part in card


def test_saving_again_replaces_a_checkpoint_but_nothing_else(model, folder):
    model.count += 1
    zoo.save(model, folder, card=CARD)
    assert zoo.load(folder).count.tolist() == [8, 8, 8]
    (folder / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"other files \(thesis.txt\)"):
        zoo.save(model, folder, card=CARD)
    assert (folder / "thesis.txt").read_text() == "precious"


def test_a_failed_save_leaves_the_old_checkpoint_and_no_scraps(model, folder, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(hub, "_write_golden", fail)
    with pytest.raises(KeyboardInterrupt):
        zoo.save(Toy(dim=5), folder, card=CARD, golden_input=torch.zeros(1, 5))
    zoo.verify(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["one"]


# --- what is wrong says so -------------------------------------------------------------------------------------------


def test_unknown_name(named_zoo):
    with pytest.raises(UnknownNameError, match=r"Unknown checkpoint 'toy/ten11'. Did you mean 'toy/ten10'"):
        zoo.load("toy/ten11")


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no metadata.json"):
        zoo.load(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "golden.safetensors"])
def test_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name} is missing"):
        zoo.verify(folder)


def test_truncated_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged: \d+ bytes"):
        zoo.load(folder)


def test_truncated_golden_file(folder):
    path = folder / "golden.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        zoo.verify(folder)


def test_altered_bytes(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="was altered"):
        zoo.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("scale"), "missing scale; not expected nothing"),
        (lambda state: state.update(stray=torch.zeros(1)), "missing nothing; not expected stray"),
        (lambda state: state.update(scale=torch.ones(4)), r"scale is float32 \(4,\), Toy has float32 \(3,\)"),
        (lambda state: state.update(count=torch.ones(3)), r"count is float32 \(3,\), Toy has int64 \(3,\)"),
    ],
)
def test_weights_that_do_not_fit(folder, change, message):
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)
    edit_metadata(folder, size=path.stat().st_size, sha256=hub._sha256(path))
    with pytest.raises(CheckpointError, match=message):
        zoo.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_path": "toys.Tyo"}, "cannot be imported"),
        ({"class_path": "subprocess.Popen"}, "no torch.nn.Module"),
        ({"init_args": {"dimension": 3}}, "does not fit toys.Toy"),
        ({"format_version": 99}, "format version 99, this moe-zoo reads 1"),
        ({"card": {}}, "does not describe a checkpoint"),
    ],
)
def test_metadata_that_does_not_fit(folder, changes, message):
    edit_metadata(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        zoo.load(folder)


def test_metadata_that_is_no_json(folder):
    (folder / "metadata.json").write_text("{")
    with pytest.raises(CheckpointError, match="not readable as JSON"):
        zoo.info(folder)


def test_another_output_than_the_golden_one(folder):
    path = folder / "golden.safetensors"
    golden = load_file(path)
    golden["output.0"][0, 0] += 1e-2
    save_file(golden, path)
    with pytest.raises(CheckpointError, match=r"output.0 differs by 0.01 \(allowed: 0.0001\)"):
        zoo.verify(folder)


def test_arguments_that_cannot_be_stored(tmp_path):
    with pytest.raises(ValueError, match=r"Toy.names is tuple .* which JSON cannot hold"):
        zoo.save(Toy(names=("a", "b")), tmp_path / "x", card=CARD)
    with pytest.raises(ValueError, match=r"keeps no attribute of that name: set self.width = width"):
        zoo.save(Forgetful(3), tmp_path / "x", card=CARD)
    assert not (tmp_path / "x").exists()


def test_a_folder_that_cannot_be_written(model, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(PermissionError, match="Cannot write the checkpoint"):
        zoo.save(model, tmp_path / "file" / "x", card=CARD)


def test_a_card_without_a_place_for_results(model, tmp_path):
    folder = zoo.save(model, tmp_path / "x", card=CARD, readme="# Mine\n")
    with pytest.raises(ValueError, match="no place for results"):
        zoo.update_metrics(folder, {"other": 2.0}, "a study", "1111111")
    assert zoo.info(folder).metrics["other"] == 1.0


def edit_metadata(folder, **changes):
    path = folder / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x, y):
        return {"x": self.first(x), "y": self.second(y)}


class Forgetful(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)
