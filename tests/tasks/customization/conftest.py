"""A small model and a synthetic writer to learn from."""

import pytest
import torch
from torch import Tensor

from tasks.customization.characters import merge
from tasks.customization.data import to_float, write_all_classes
from tasks.customization.model import CustomizedLeNet


@pytest.fixture(scope="session")
def writer() -> tuple[Tensor, Tensor]:
    """Images and merged labels of a synthetic writer: 62 classes, four samples each."""
    samples = write_all_classes(7, 4)
    return to_float(samples.images), merge(samples.labels)


@pytest.fixture
def model() -> CustomizedLeNet:
    """An untrained model whose replay buffer holds another synthetic writer."""
    torch.manual_seed(0)
    model = CustomizedLeNet(replay_size=62)
    samples = write_all_classes(8, 1)
    model.eval().fill_replay(to_float(samples.images), merge(samples.labels))
    return model
