"""The command line: what it prints, where it writes, and how it says no."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from toys import CARD, CONFIG, Toy, ToyTask

import zoo
from zoo import cli, hub
from zoo.cli import main, run


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("toy.yaml", CONFIG)
    return tmp_path


@pytest.fixture
def checkpoint(here, monkeypatch):
    zoo.save(Toy(), here / "checkpoints/toy/one", card=CARD, golden_input=torch.randn(2, 4), config=CONFIG)
    monkeypatch.setattr(hub, "assets", lambda: here)
    return "toy/one"


def write(path, config):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(yaml.safe_dump(config))


def sentence(capsys, *args):
    """The one line that a failing command prints."""
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Seed set to")]
    assert line.startswith("moe-zoo: ")
    return line


# --- names and cards -------------------------------------------------------------------------------------------------


def test_list(checkpoint, capsys):
    main(["list"])
    assert capsys.readouterr().out == "toy/one\n"
    main(["list", "t*", "--json"])
    assert json.loads(capsys.readouterr().out) == ["toy/one"]
    main(["list", "none/*"])
    assert "No checkpoint matches 'none/*'" in capsys.readouterr().err


def test_info(checkpoint, capsys):
    main(["info", checkpoint])
    shown = capsys.readouterr().out
    for part in (
        "A toy",
        "seeded noise (synthetic)",
        "Apache-2.0",
        "moe-zoo test toy/one (commit 0000000, seed 0)",
        "0.5",
    ):
        assert part in shown
    main(["info", checkpoint, "--json"])
    assert json.loads(capsys.readouterr().out)["metrics"] == {"loss": 0.5, "other": 1.0}


def test_help_and_version(capsys):
    for args in ([], ["--help"], ["-h"]):
        main(args)
        assert "moe-zoo list" in capsys.readouterr().out
    main(["--version"])
    assert capsys.readouterr().out == f"moe-zoo {zoo.__version__}\n"


def test_names_and_help_import_nothing_heavy():
    code = """
import sys, zoo
from zoo.cli import main
main(["list"]); main(["--help"]); main(["--version"])
print([name for name in ("torch", "pytorch_lightning", "numpy", "pandas", "rich") if name in sys.modules])
"""
    root = Path(__file__).parents[2]
    printed = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[-1] == "[]"


# --- training and scoring --------------------------------------------------------------------------------------------


def test_fit_then_test_then_predict(here, capsys):
    assert main(["fit", "-c", "toy.yaml", "--out", "runs/toy"]) == {}
    assert capsys.readouterr().out.splitlines()[-1] == "runs/toy"
    assert {path.name for path in (here / "runs/toy/checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert (here / "runs/toy/logs/version_0/metrics.csv").is_file()
    assert (here / "runs/toy/logs/version_0/config.yaml").is_file()
    metrics = main(["test", "-c", "toy.yaml", "--out=runs/toy", "--ckpt_path", "last"])
    assert json.loads((here / "runs/toy/metrics.json").read_text()) == metrics
    assert capsys.readouterr().out.splitlines()[-1] == "runs/toy"
    main(["predict", "-c", "toy.yaml", "--out", "runs/toy"])
    assert capsys.readouterr().out.splitlines()[-1] == "runs/toy"
    main(["validate", "-c", "toy.yaml", "--out", "runs/toy"])


@pytest.mark.parametrize("command", ["test", "predict"])
def test_scores_are_of_all_samples_in_one_process(command, here, capsys):
    for option in ("--trainer.devices=2", "--trainer.devices=[0,1]", "--trainer.num_nodes=2"):
        told = sentence(capsys, command, "-c", "toy.yaml", "--out", "runs/toy", option)
        assert f"{option.removeprefix('--').replace(',', ', ')}" in told
        assert f"{command} runs on one device: set both to 1, or name one in a list." in told
    # As many as the machine has would be used.
    trainer = {"callbacks": None, "enable_checkpointing": False, "logger": False, "num_nodes": 1}
    task = SimpleNamespace(monitor=None)
    for devices, found in (("auto", {"devices": 1}), (1, {}), ([3], {})):
        configured = SimpleNamespace(**trainer, devices=devices)
        files = cli._run_files(command, here, task, configured)
        assert {name: files[name] for name in files if name == "devices"} == found
    assert "devices" not in cli._run_files("fit", here, task, SimpleNamespace(**trainer, devices="auto"))


def test_the_script_returns_no_exit_code(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["moe-zoo", "--version"])
    assert main() is None


def test_a_checkpoint_is_scored_by_its_name_and_by_its_folder(checkpoint, here):
    by_name = zoo.evaluate(checkpoint)
    assert set(by_name) == {"loss"}
    folder = here / "elsewhere"
    (here / "checkpoints/toy/one").rename(folder)
    assert zoo.evaluate(folder, data_root=here) == by_name


@pytest.mark.parametrize("text", ["model: [", "", "model: toy.ToyTask"])
def test_a_checkpoints_config_that_names_no_network(text, checkpoint, here, capsys):
    (here / "checkpoints/toy/one/config.yaml").write_text(text)
    told = sentence(capsys, "test", checkpoint)
    assert ("config.yaml is damaged, no YAML" in told) == (text == "model: [")


def test_an_interrupted_run_resumes_as_if_nothing_had_happened():
    write("toy.yaml", CONFIG | {"trainer": CONFIG["trainer"] | {"max_epochs": 3}})
    main(["fit", "-c", "toy.yaml", "--out", "whole"])
    with pytest.raises(SystemExit):
        main(["fit", "-c", "toy.yaml", "--out", "parts", "--model.stop_at", "10"])
    assert weights("parts")["epoch"] == 1
    main(["fit", "-c", "toy.yaml", "--out", "parts", "--ckpt_path", "last"])
    whole, parts = weights("whole"), weights("parts")
    assert (whole["epoch"], whole["global_step"]) == (parts["epoch"], parts["global_step"]) == (2, 12)
    for key, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, parts["state_dict"][key])


def test_a_resumed_run_keeps_the_best_checkpoint(monkeypatch):
    def judge(task, batch, batch_idx):
        task.log("val_loss", [3.0, 1.0, 2.0, 2.5][task.current_epoch])

    monkeypatch.setattr("toys.ToyTask.validation_step", judge)
    write("toy.yaml", CONFIG | {"trainer": CONFIG["trainer"] | {"max_epochs": 4}})
    main(["fit", "-c", "toy.yaml", "--out", "whole"])
    with pytest.raises(SystemExit):
        main(["fit", "-c", "toy.yaml", "--out", "parts", "--model.stop_at", "10"])
    main(["fit", "-c", "toy.yaml", "--out", "parts", "--ckpt_path", "last"])
    whole, parts = weights("whole", "best"), weights("parts", "best")
    assert whole["epoch"] == parts["epoch"] == 1
    for key, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, parts["state_dict"][key])


def test_the_path_of_a_checkpoint_brings_its_hyperparameters_and_last_does_not(monkeypatch):
    dims = []
    configure = ToyTask.configure_models

    def watched(task):
        dims.append(task.dim)
        configure(task)

    main(["fit", "-c", "toy.yaml"])
    monkeypatch.setattr(ToyTask, "configure_models", watched)
    main(["test", "-c", "toy.yaml", "--model.dim=5", "--ckpt_path", "runs/checkpoints/last.ckpt"])
    with pytest.raises(RuntimeError, match="size mismatch"):
        main(["test", "-c", "toy.yaml", "--model.dim=5", "--ckpt_path", "last"])
    assert dims == [4, 5]


def test_ctrl_c_says_where_the_last_checkpoint_lies(capsys):
    handler = signal.getsignal(signal.SIGINT)
    for step, told in (
        (1, "before the first epoch ended: there is nothing to resume"),
        (5, "runs/checkpoints/last.ckpt"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["fit", "-c", "toy.yaml", f"--model.stop_at={step}"])
        assert stop.value.code == 130
        assert told in capsys.readouterr().err
        assert signal.getsignal(signal.SIGINT) == handler


def weights(folder, name="last"):
    return torch.load(f"{folder}/checkpoints/{name}.ckpt", weights_only=True)


def test_shipped_configs_are_found_from_any_folder(here, monkeypatch, capsys):
    assets = here / "assets"
    write(assets / "configs/toy/small.yaml", CONFIG)
    monkeypatch.setattr(hub, "assets", lambda: assets)
    run(["test", "-c", "configs/toy/small.yaml"])
    line = sentence(capsys, "test", "-c", "configs/toy/smal.yaml")
    assert "Unknown config 'configs/toy/smal.yaml'. Did you mean 'configs/toy/small.yaml'?" in line


# --- what is wrong says so -------------------------------------------------------------------------------------------


def test_unknown_command(capsys):
    assert "Unknown command 'tset'. Did you mean 'test'" in sentence(capsys, "tset")


def test_unknown_demo(capsys):
    assert "Name the application to demonstrate: moe-zoo demo " in sentence(capsys, "demo")
    assert "Unknown demo 'customisation'" in sentence(capsys, "demo", "customisation")


def test_unknown_checkpoint(checkpoint, capsys):
    assert "Unknown checkpoint 'toy/won'. Did you mean 'toy/one'?" in sentence(capsys, "test", "toy/won")
    assert "Unknown checkpoint 'toy/won'" in sentence(capsys, "info", "toy/won")


def test_checkpoint_without_config(checkpoint, here, capsys):
    (here / "checkpoints/toy/one/config.yaml").unlink()
    assert "toy/one holds no config.yaml" in sentence(capsys, "test", checkpoint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"class_path": "toys.ToyTusk"}}, "Did you mean 'toys.ToyTask'"),
        ({"model": {"class_path": "ToyTusk"}}, "Unknown class for 'model' 'ToyTusk'. Did you mean 'ToyTask'"),
        ({"model": {"class_path": "no.such.Task"}}, "Unknown class for 'model' 'no.such.Task'"),
        ({"data": {"class_path": "toys.ToyDat"}}, "Did you mean 'toys.ToyData'"),
        (
            {"model": {"class_path": "toys.ToyTask", "init_args": {"din": 3}}},
            "Unknown option of toys.ToyTask 'din'. Did you mean 'dim'? Allowed: dim, pretrained, stop_at.",
        ),
        ({"modle": {"dim": 3}}, "Unknown option 'modle.dim'. Did you mean 'model'"),
        ({"trainer": {"max_epoch": 3}}, "Unknown option 'trainer.max_epoch'. Did you mean 'trainer.max_epochs'"),
        (
            {"model": {"class_path": "toys.ToyTask", "init_args": {"dim": "wide"}}},
            "\"dim\": Expected a <class 'int'>. Got value: wide",
        ),
    ],
)
def test_a_config_with_a_mistake(changes, message, capsys):
    write("bad.yaml", CONFIG | changes)
    assert message in sentence(capsys, "fit", "-c", "bad.yaml")


def test_a_class_whose_extra_is_not_installed(here, monkeypatch, capsys):
    (here / "needy.py").write_text("import not_installed\n")
    monkeypatch.syspath_prepend(here)
    write("bad.yaml", CONFIG | {"model": {"class_path": "needy.Task"}})
    assert "No module named 'not_installed'" in sentence(capsys, "fit", "-c", "bad.yaml")


def test_no_best_checkpoint_without_a_number_to_rank_by(here, monkeypatch):
    monkeypatch.setattr("toys.ToyTask.monitor", None)
    main(["fit", "-c", "toy.yaml"])
    assert [path.name for path in (here / "runs/checkpoints").iterdir()] == ["last.ckpt"]


def test_fit_takes_a_config_where_others_take_a_name(capsys):
    said = sentence(capsys, "fit", "reward/dmoerm-minilm")
    assert "fit takes -c CONFIG first" in said and "add --model.pretrained reward/dmoerm-minilm" in said


def test_unknown_option(capsys):
    line = sentence(capsys, "fit", "-c", "toy.yaml", "--trainr.max_epochs=3")
    assert "Unknown option 'trainr.max_epochs'. Did you mean 'trainer.max_epochs'" in line


def test_yaml_that_is_none(here, capsys):
    (here / "bad.yaml").write_text("trainer: [3\n")
    assert "Problems parsing config" in sentence(capsys, "fit", "-c", "bad.yaml")


def test_nothing_to_resume(capsys):
    assert "There is no last.ckpt in runs/checkpoints" in sentence(
        capsys, "test", "-c", "toy.yaml", "--ckpt_path", "last"
    )


def test_a_run_folder_that_cannot_be_written(here, capsys):
    (here / "file").touch()
    assert "Cannot write the run folder file/x" in sentence(capsys, "fit", "-c", "toy.yaml", "--out", "file/x")


def test_missing_data_root(monkeypatch, capsys):
    monkeypatch.delenv("MOE_ZOO_DATA", raising=False)
    monkeypatch.setattr("toys.ToyData.setup", lambda self, stage: zoo.data.data_root(self.root))
    line = sentence(capsys, "fit", "-c", "toy.yaml", "--data.root", "nowhere")
    assert "Could not find the data folder. Looked in: nowhere." in line
    assert "MOE_ZOO_DATA" in line


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("MOE_ZOO_DEBUG", "1")
    with pytest.raises(zoo.UnknownNameError):
        main(["tset"])
