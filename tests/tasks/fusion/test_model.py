"""MoE-Fusion against the paper's formulas and the issue's promises."""

import pytest
import torch
from torch import nn

from tasks.fusion.model import MARGIN, MoEFusion
from zoo.moe import collect_aux_losses


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture
def model() -> MoEFusion:
    torch.manual_seed(0)
    return MoEFusion().eval()


@pytest.mark.parametrize("size", [(64, 96), (41, 57), (1, 3), (50, 33)])
@pytest.mark.parametrize("mixture", [True, False])
def test_any_size_in_same_size_out(size: tuple[int, int], mixture: bool) -> None:
    model = MoEFusion(mixture=mixture).eval()
    infrared, visible = torch.rand(2, 1, *size), torch.rand(2, 1, *size)
    fusion = model.fuse(infrared, visible)
    assert fusion.fused.shape == fusion.attention.shape == infrared.shape
    assert torch.equal(model(infrared, visible), fusion.fused.clamp(0, 1))
    assert set(fusion.routing) == ({"foreground", "background", "whole"} if mixture else set())


def test_an_untrained_network_averages(model: MoEFusion) -> None:
    infrared, visible = torch.rand(1, 1, 64, 64), torch.rand(1, 1, 64, 64)
    assert (model(infrared, visible) - (infrared + visible) / 2).abs().max() < 0.05


def test_local_experts_are_one_of_each_band_and_weights_sum_to_one(model: MoEFusion) -> None:
    routing = model.fuse(torch.rand(8, 1, 32, 32), torch.rand(8, 1, 32, 32)).routing
    for name in ("foreground", "background"):
        bands = routing[name].expert_index // 2
        assert (bands.sort(1).values == torch.tensor([0, 1])).all()
    for decision in routing.values():
        assert decision.expert_index.shape == (8, 2)
        assert torch.allclose(decision.expert_weight.sum(1), torch.ones(8))


def test_without_one_per_band_an_image_may_have_two_of_one() -> None:
    torch.manual_seed(0)
    model = MoEFusion(one_per_band=False).eval()
    with torch.no_grad():
        # One positive feature suffices: the gate then prefers both infrared experts.
        model.foreground.router.weight.zero_()[:2] = 1.0
    routing = model.fuse(torch.rand(4, 1, 32, 32), torch.rand(4, 1, 32, 32)).routing["foreground"]
    assert (routing.expert_index < 2).all()


def test_the_whole_is_logsumexp_of_the_chosen_experts(model: MoEFusion) -> None:
    """The global mixture against the paper's formula, expert by expert."""
    seen = []
    model.whole.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    infrared, visible = torch.rand(3, 1, 48, 64), torch.rand(3, 1, 48, 64)
    fusion = model.fuse(infrared, visible)
    routing = fusion.routing["whole"]
    for image in range(3):
        total = torch.zeros(())
        for expert, weight in zip(routing.expert_index[image], routing.expert_weight[image], strict=True):
            total = total + weight * model.whole.experts.experts[int(expert)](seen[0][image : image + 1]).exp()
        drawn = total.log()[..., MARGIN:-MARGIN, MARGIN:-MARGIN]
        expected = (infrared[image] + visible[image]) / 2 + drawn[0]
        assert torch.allclose(fusion.fused[image], expected, atol=1e-6)


def test_only_chosen_experts_run(model: MoEFusion) -> None:
    ran = []
    for number, expert in enumerate(model.whole.experts.experts):
        expert.register_forward_hook(lambda *_, number=number: ran.append(number))
    fusion = model.fuse(torch.rand(1, 1, 32, 32), torch.rand(1, 1, 32, 32))
    assert sorted(ran) == sorted(fusion.routing["whole"].expert_index[0].tolist())


def test_an_image_does_not_depend_on_its_batch_mates(model: MoEFusion) -> None:
    infrared, visible = torch.rand(4, 1, 40, 40), torch.rand(4, 1, 40, 40)
    together = model(infrared, visible)
    alone = torch.cat([model(infrared[i : i + 1], visible[i : i + 1]) for i in range(4)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_gates_are_small_and_the_twin_is_as_large_as_what_is_active(model: MoEFusion) -> None:
    gates = sum(parameters(mixture.router) for mixture in (model.foreground, model.background, model.whole))
    assert gates < 0.05 * parameters(model)
    mixtures = (model.foreground, model.background, model.whole)
    idle = sum(parameters(mixture.experts) / 2 for mixture in mixtures)
    twin = parameters(MoEFusion(mixture=False))
    assert twin == pytest.approx(parameters(model) - gates - idle, rel=0.03)


def test_everything_learns(model: MoEFusion) -> None:
    fusion = model.train().fuse(torch.rand(8, 1, 32, 32), torch.rand(8, 1, 32, 32))
    (fusion.fused.square().mean() + collect_aux_losses(model).total).backward()
    for name, parameter in model.named_parameters():
        if "experts.experts" not in name:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_given_attention_is_used() -> None:
    torch.manual_seed(0)
    model = MoEFusion(attention="boxes").eval()
    infrared, visible = torch.rand(1, 1, 32, 32), torch.rand(1, 1, 32, 32)
    everywhere = torch.ones_like(infrared)
    assert not torch.equal(
        model.fuse(infrared, visible, everywhere).fused, model.fuse(infrared, visible, 1 - everywhere).fused
    )
    with pytest.raises(ValueError, match="box_attention"):
        model(infrared, visible)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"num_experts": 3}, "num_experts=3"), ({"top_k": 1}, "top_k=1"), ({"attention": "saliancy"}, "saliency")],
)
def test_arguments_that_do_not_fit(arguments: dict[str, object], words: str) -> None:
    with pytest.raises((ValueError, KeyError), match=words):
        MoEFusion(**arguments)


def test_bands_that_do_not_fit(model: MoEFusion) -> None:
    with pytest.raises(ValueError, match="alike"):
        model(torch.rand(1, 1, 8, 8), torch.rand(1, 1, 8, 9))
    with pytest.raises(ValueError, match="alike"):
        model(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8))
