"""What configurations allow, and how many experts they give to each layer."""

import re

import pytest
import torch
from peft import get_peft_model
from torch import nn

from tests.zoo.lora.networks import make_base, make_config, old_name
from zoo.lora import LoraMixture, MolaConfig, SmoraConfig
from zoo.lora.allocation import experts_at, find_layer

pytestmark = old_name


def stack(depth: int) -> nn.Module:
    return nn.ModuleDict({"layers": nn.ModuleList(nn.Sequential(nn.Linear(3, 3)) for _ in range(depth))})


def experts(allocation: object, depth: int) -> list[int]:
    model = stack(depth)
    return [experts_at(allocation, model, f"layers.{layer}.0") for layer in range(depth)]


@pytest.mark.parametrize("pattern", ["2-4-6-8", "8-6-4-2", "8-2-2-8", "5-5-5-5", "8-8-8-8"])
def test_patterns_are_four_equal_blocks(pattern: str) -> None:
    numbers = [int(number) for number in pattern.split("-")]
    assert experts(pattern, 4) == numbers
    assert experts(pattern, 32) == [number for number in numbers for _ in range(8)]


def test_the_four_patterns_of_the_paper_have_equally_many_experts() -> None:
    """160 over 32 layers, and as many parameters."""
    sizes = []
    for pattern in ("2-4-6-8", "8-6-4-2", "8-2-2-8", "5-5-5-5"):
        assert sum(experts(pattern, 32)) == 160
        model = get_peft_model(make_base("llama"), MolaConfig(experts=pattern, target_modules="all-linear"))
        sizes.append(model.get_nb_trainable_parameters()[0])
    assert len(set(sizes)) == 1


def test_lists_and_numbers_fit_any_depth() -> None:
    for numbers in ([2, 3, 4, 6, 7, 8], [8, 7, 6, 4, 3, 2], [8, 5, 2, 2, 5, 8], [5] * 6):
        assert experts(numbers, 6) == numbers and sum(numbers) == 30
    assert experts(3, 6) == [3] * 6


@pytest.mark.parametrize("layers", [None, [1, 3]])
def test_experts_are_where_the_allocation_says(layers: list[int] | None) -> None:
    config = make_config("mola", "bert", experts=[2, 3, 4, 5], layers_to_transform=layers)
    model = get_peft_model(make_base("bert"), config)
    found = {
        (name.split(".layer.")[1][0], module.router.num_experts)
        for name, module in model.named_modules()
        if isinstance(module, LoraMixture)
    }
    expected = {("0", 2), ("1", 3), ("2", 4), ("3", 5)}
    assert found == {(layer, experts) for layer, experts in expected if layers is None or int(layer) in layers}


def test_the_outermost_list_counts() -> None:
    inner = nn.ModuleList(nn.Linear(2, 2) for _ in range(7))
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"experts": inner}) for _ in range(3)])})
    assert find_layer(model, "layers.2.experts.5") == (2, 3)
    assert find_layer(nn.ModuleDict({"head": nn.Linear(2, 2)}), "head") is None


@pytest.mark.parametrize(
    ("allocation", "depth", "sentence"),
    [
        ("2-4-6-8", 6, "needs 4 equal blocks, but 'layers.0.0' lies in a stack of 6 layers. Give a list of 6 numbers"),
        ([2, 3], 6, "must hold one number for each of 6 layers"),
    ],
)
def test_a_depth_that_does_not_fit_is_an_error(allocation: object, depth: int, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        experts(allocation, depth)


def test_a_module_outside_of_the_layers_is_an_error_for_lists_only() -> None:
    with pytest.raises(ValueError, match=re.escape("Leave it out by exclude_modules=['head']")):
        experts_at("2-4-6-8", nn.ModuleDict({"head": nn.Linear(2, 2)}), "head")
    assert experts_at(3, nn.ModuleDict({"head": nn.Linear(2, 2)}), "head") == 3


@pytest.mark.parametrize("allocation", [0, [], [2, 0, 2, 2], "2-0-2-2"])
def test_layers_without_experts_are_an_error(allocation: object) -> None:
    with pytest.raises(ValueError, match="every layer needs one expert or more"):
        MolaConfig(experts=allocation)


@pytest.mark.parametrize("pattern", ["2-4-6", "2,4,6,8", "a-b-c-d", "2-4-6-8-9", ""])
def test_a_pattern_of_another_form_is_an_error(pattern: str) -> None:
    with pytest.raises(ValueError, match="a pattern is 4 numbers such as '2-4-6-8'"):
        MolaConfig(experts=pattern)


def test_fewer_experts_than_a_unit_uses_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"top_k=3: is more than the 2 experts of '.*layers\.0\..*'; a soft mixture"):
        get_peft_model(make_base("llama"), make_config("mola", "llama", top_k=3))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"r": 0}, "r=0: must be at least 1"),
        ({"top_k": 65}, "top_k=65: must be in 1..r=64"),
        ({"top_k": 0}, "top_k=0: must be in 1..r=64"),
        ({"block_size": 7}, "r=64: must be a multiple of block_size=7"),
        ({"block_size": 16}, "top_k=8: must be a multiple of block_size=16"),
        ({"block_size": 0}, "block_size=0: must be at least 1"),
        ({"block_size": 8}, "top_k=8: is a single block, whose normalised gate is constant"),
        ({"top_k": 1}, "top_k=1: is a single block"),
        ({"score": "none"}, "top_k=8: must be r=64 for score='none'"),
        ({"score": "tanh"}, "score='tanh': must be one of sigmoid, softmax, none"),
        ({"alpha": 0}, "alpha=0: must be positive"),
        ({"dropout": 1.0}, "dropout=1.0: must be in [0, 1)"),
        ({"target_modules": "all-linear", "layers_to_transform": [0]}, "list their names"),
        ({"layers_pattern": "layer"}, "layers_pattern='layer': says what layers_to_transform counts"),
    ],
)
def test_smora_refuses_what_does_not_fit(options: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        SmoraConfig(**options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"r": 0}, "r=0: must be at least 1"),
        ({"top_k": 0}, "top_k=0: must be at least 1, or None for all"),
        ({"top_k": None, "aux_losses": {"load_balancing": 0.1}}, "has no effect where every unit uses all experts"),
    ],
)
def test_mola_refuses_what_does_not_fit(options: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        MolaConfig(**options)


def test_losses_are_those_of_the_method_unless_named() -> None:
    assert MolaConfig().aux_losses == {"load_balancing": 0.03}
    assert MolaConfig(top_k=None).aux_losses == SmoraConfig().aux_losses == {}
    assert MolaConfig(aux_losses={}).aux_losses == {} and MolaConfig(aux_losses={"z": 0.1}).aux_losses == {"z": 0.1}


def test_unknown_losses_are_an_error() -> None:
    with pytest.raises(ValueError, match="Unknown auxiliary loss 'balance'"):
        get_peft_model(make_base("mlp"), make_config("smora", "mlp", aux_losses={"balance": 1.0}))


def test_every_router_is_one_of_the_core() -> None:
    linear = nn.Sequential(nn.Linear(6, 5))

    def name(config: SmoraConfig | MolaConfig) -> str:
        router = config.build(6, 5, linear, "0").router
        assert type(router).__module__.startswith("zoo.moe.routers")
        return type(router).__name__

    assert name(SmoraConfig()) == "TopKRouter" and name(MolaConfig(experts=4)) == "TopKRouter"
    assert name(MolaConfig(experts=4, top_k=None)) == "DenseRouter"
    assert name(SmoraConfig(top_k=64, score="none")) == "DenseRouter"


def test_parameters_are_those_of_the_equations() -> None:
    linear = nn.Sequential(nn.Linear(6, 5))

    def shapes(config: SmoraConfig | MolaConfig) -> dict[str, tuple[int, ...]]:
        return {key: tuple(value.shape) for key, value in config.build(6, 5, linear, "0").state_dict().items()}

    assert shapes(SmoraConfig(r=8, top_k=4, block_size=2)) == {
        "lora_A": (8, 6),
        "lora_B": (5, 8),
        "router.weight": (4, 6),
        "router.expert_bias": (4,),
    }
    assert shapes(MolaConfig(r=2, experts=3)) == {"lora_A": (6, 6), "lora_B": (5, 6), "router.weight": (3, 6)}
    hydra = MolaConfig(r=2, experts=3, top_k=None, shared_a=True)
    assert shapes(hydra) == {"lora_A": (2, 6), "lora_B": (5, 6), "router.weight": (3, 6)}
    assert shapes(MolaConfig(r=2, experts=1, top_k=1)) == {"lora_A": (2, 6), "lora_B": (5, 2)}
    for plain in (SmoraConfig(r=2, top_k=2, score="none"), SmoraConfig(r=2, top_k=2, block_size=2)):
        assert shapes(plain) == {"lora_A": (2, 6), "lora_B": (5, 2)}


def test_initial_weights_are_those_of_pefts_lora() -> None:
    torch.manual_seed(0)
    mixture = SmoraConfig(r=64, top_k=8).build(400, 5, nn.Sequential(nn.Linear(400, 5)), "0")
    assert mixture.lora_A.abs().max() <= 1 / 20 and mixture.lora_A.std().item() == pytest.approx(
        1 / 20 / 3**0.5, rel=0.02
    )
    assert not mixture.lora_B.any()
