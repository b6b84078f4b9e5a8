"""The wheel works outside the clone."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from toys import CARD, CONFIG, Toy

import zoo

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the unpacked wheel of this tree plus one checkpoint and one config of the tests' own."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    for folder in ("zoo", "tasks", "configs", "checkpoints"):
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / file, source)
    (source / "README.md").touch()
    zoo.save(Toy(), source / "checkpoints/toy/one", card=CARD, golden_input=torch.randn(2, 4), config=CONFIG)
    (source / "configs/toy").mkdir(parents=True)
    (source / "configs/toy/small.yaml").write_text((source / "checkpoints/toy/one/config.yaml").read_text())
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", target], cwd=source, check=True)
    (wheel,) = target.glob("moe_zoo-*.whl")
    zipfile.ZipFile(wheel).extractall(target / "unpacked")
    return target / "unpacked"


def moe_zoo(installed, folder, *args):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(installed), str(ROOT / "tests/helpers")])}
    command = [sys.executable, "-m", "zoo", *args]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_content(installed):
    for path in ("zoo/py.typed", "zoo/_assets/configs/toy/small.yaml", "zoo/_assets/checkpoints/toy/one/README.md"):
        assert (installed / path).is_file()
    assert not (installed / "tests").exists()
    assert not (installed / "configs").exists()


def test_names_from_an_empty_folder(installed, tmp_path):
    assert "toy/one" in moe_zoo(installed, tmp_path, "list")
    assert moe_zoo(installed, tmp_path, "info", "toy/one")[0] == "toy/one: A toy"


def test_scores_from_an_empty_folder(installed, tmp_path):
    assert moe_zoo(installed, tmp_path, "test", "toy/one")[-1] == "runs"
    assert (tmp_path / "runs/metrics.json").is_file()
