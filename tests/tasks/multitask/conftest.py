"""Bases that the tests of this application share."""

import pytest

from tests.tasks.multitask.builders import save_causal, save_encoder


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny BERT."""
    return save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def causal(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny Llama."""
    return save_causal(tmp_path_factory.mktemp("causal"))
