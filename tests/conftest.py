"""Offline, without a display, on one thread: set before anything heavy is imported."""

import os

os.environ.update(HF_HUB_OFFLINE="1", MPLBACKEND="Agg")
os.environ.pop("MOE_ZOO_DEBUG", None)

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
