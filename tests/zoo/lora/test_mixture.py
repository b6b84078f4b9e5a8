"""The mathematics of a mixture of LoRA experts: against loops over units and experts, and against PEFT's LoRA."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from zoo.lora import LoraMixture, MolaConfig, SmoraConfig
from zoo.moe import NoisyTopKRouter, collect_aux_losses, update_selection_biases

IN, OUT = 6, 5
LINEAR = nn.Sequential(nn.Linear(IN, OUT))

CONFIGS = {
    "smora": SmoraConfig(r=8, top_k=3),
    "smora_softmax": SmoraConfig(r=8, top_k=3, score="softmax", balance=False),
    "smora_blocks": SmoraConfig(r=8, top_k=4, block_size=2),
    "smora_all": SmoraConfig(r=8, top_k=8),
    "smora_unit": SmoraConfig(r=8, top_k=8, score="none"),
    "mola": MolaConfig(r=2, experts=4),
    "mola_top1": MolaConfig(r=2, experts=4, top_k=1),
    "mola_single": MolaConfig(r=3, experts=1, top_k=1),
    "soft": MolaConfig(r=2, experts=4, top_k=None),
    "hydra": MolaConfig(r=2, experts=3, top_k=None, shared_a=True),
    "shared_a_top2": MolaConfig(r=2, experts=3, shared_a=True),
}


def make_mixture(config: SmoraConfig | MolaConfig) -> LoraMixture:
    """With B away from zero, and biases that decide something."""
    torch.manual_seed(0)
    mixture = config.build(IN, OUT, LINEAR, "0")
    nn.init.normal_(mixture.lora_B)
    if mixture.biased_router is not None:
        mixture.router.expert_bias.copy_(0.3 * torch.randn(mixture.router.num_experts))
    return mixture


def loop(config: SmoraConfig | MolaConfig, mixture: LoraMixture, x: Tensor, mask: Tensor) -> Tensor:
    """What is added for each unit, expert by expert, from the equations of the papers."""
    rows = []
    for unit, real in zip(x, mask.tolist(), strict=True):
        added = torch.zeros(OUT, dtype=x.dtype)
        # A plain LoRA reaches padding too.
        for expert, weight in chosen(config, mixture, unit) if real or mixture.is_constant else []:
            ranks = slice(expert * mixture.rank, (expert + 1) * mixture.rank)
            down = mixture.lora_A if getattr(config, "shared_a", False) else mixture.lora_A[ranks]
            added = added + weight * (mixture.lora_B[:, ranks] @ (down @ unit))
        rows.append(added)
    return torch.stack(rows)


def chosen(config: SmoraConfig | MolaConfig, mixture: LoraMixture, unit: Tensor) -> list[tuple[int, Tensor]]:
    """The experts of one unit, and the factor of each."""
    experts, router = mixture.router.num_experts, mixture.router
    if mixture.is_constant:
        return [(expert, torch.tensor(config.alpha / config.r)) for expert in range(experts)]
    logits = router.weight @ unit
    if isinstance(config, MolaConfig):
        probs = torch.exp(logits) / torch.exp(logits).sum()
        best = sorted(range(experts), key=lambda e: -probs[e].item())[: config.top_k]
        total = probs[best].sum() if len(best) > 1 else 1.0
        return [(expert, config.alpha / config.r * probs[expert] / total) for expert in best]
    scores = torch.softmax(logits, 0) if config.score == "softmax" else 1 / (1 + torch.exp(-logits))
    bias = router.expert_bias if config.balance else torch.zeros(experts)
    active = config.top_k // config.block_size
    best = sorted(range(experts), key=lambda e: -(scores[e] + bias[e]).item())[:active]
    # k g / sum(g) over ranks, each rank of a block having its block's gate.
    return [
        (expert, config.alpha / config.top_k * config.top_k * scores[expert] / (config.block_size * scores[best].sum()))
        for expert in best
    ]


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("training", [True, False])
def test_forward_and_gradients_equal_a_loop_over_units(case: str, training: bool) -> None:
    config = CONFIGS[case]
    mixture = make_mixture(config).train(training)
    x, base = torch.randn(3, 4, IN, requires_grad=True), torch.randn(3, 4, OUT)
    mask = torch.rand(12) > 0.3
    weights = [x, *mixture.parameters()]
    ours = mixture(base, x, mask)
    theirs = base + loop(config, mixture, x.flatten(0, 1), mask).view_as(base)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    target = torch.randn_like(ours)
    for mine, other in zip(
        torch.autograd.grad((ours * target).sum(), weights),
        torch.autograd.grad((theirs * target).sum(), weights),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", CONFIGS)
def test_one_product_gives_what_two_give(case: str) -> None:
    """In float64 A and router are multiplied apart, as routers score in float32; a mask of ones changes nothing."""
    mixture = make_mixture(CONFIGS[case])
    x, base = torch.randn(7, IN), torch.randn(7, OUT)
    fused = mixture(base, x)
    torch.testing.assert_close(fused, mixture(base, x, torch.ones(7, dtype=torch.bool)))
    apart = mixture.double()(base.double(), x.double())
    assert apart.dtype == torch.float64
    torch.testing.assert_close(fused, apart.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["smora", "smora_softmax", "smora_blocks", "smora_all"])
def test_gates_sum_to_the_number_of_active_ranks(case: str) -> None:
    config, seen = CONFIGS[case], []
    mixture = make_mixture(config)
    mixture.observe_routing(seen.append)
    mixture(torch.zeros(9, OUT), torch.randn(9, IN))
    of_ranks = seen[0].dense_weight().repeat_interleave(config.block_size, dim=1)
    torch.testing.assert_close(of_ranks.sum(1), torch.full((9,), float(config.top_k)))
    assert ((of_ranks > 0).sum(1) == config.top_k).all()


def test_a_mixture_of_loras_is_one_lora_with_ranks_in_blocks() -> None:
    """SMoRA's claim: MoLA's experts are blocks of ranks of SMoRA, of which as many are active."""
    mola = make_mixture(MolaConfig(r=4, experts=8, top_k=2, alpha=16))
    smora = make_mixture(SmoraConfig(r=32, top_k=8, block_size=4, score="softmax", balance=False, alpha=4 * 8 / 2))
    smora.load_state_dict(mola.state_dict())
    x, base = torch.randn(20, IN), torch.randn(20, OUT)
    torch.testing.assert_close(smora(base, x), mola(base, x))
    # The same from LoRA experts that are modules of their own.
    routing = mola.router(x)
    for unit in range(20):
        experts = [(mola.lora_A[4 * e : 4 * e + 4], mola.lora_B[:, 4 * e : 4 * e + 4]) for e in range(8)]
        expected = base[unit] + sum(
            w * 16 / 4 * experts[e][1] @ experts[e][0] @ x[unit]
            for e, w in zip(routing.expert_index[unit].tolist(), routing.expert_weight[unit], strict=True)
        )
        torch.testing.assert_close(mola(base, x)[unit], expected, atol=1e-5, rtol=1e-5)


def peft_lora(base: nn.Module, r: int, alpha: float) -> nn.Module:
    return get_peft_model(base, LoraConfig(r=r, lora_alpha=alpha, target_modules=["0"], init_lora_weights=False))


def with_our_weights(lora: nn.Module, mixture: LoraMixture) -> nn.Module:
    layer = lora.base_model.model[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(mixture.lora_A)
        layer.lora_B["default"].weight.copy_(mixture.lora_B)
    return lora


PLAIN = {
    "unit gates": SmoraConfig(r=8, top_k=8, score="none", alpha=24, target_modules=["0"], init_weights=False),
    "single expert": MolaConfig(r=8, experts=1, top_k=1, alpha=24, target_modules=["0"], init_weights=False),
    # Through scores, top-k and normalisation: equal scores are gates of 1.
    "equal scores": SmoraConfig(r=8, top_k=8, alpha=24, target_modules=["0"], init_weights=False),
    "one block": SmoraConfig(r=8, top_k=8, block_size=8, alpha=24, target_modules=["0"], init_weights=False),
}


@pytest.mark.parametrize("case", PLAIN)
def test_without_a_choice_it_is_pefts_lora(case: str) -> None:
    """Outputs and gradients in float64 to its last digits, where the mixture is exact."""
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(IN, OUT)).double()
    ours = get_peft_model(nn.Sequential(nn.Linear(IN, OUT)).double(), PLAIN[case]).double()
    ours.base_model.model[0].base_layer.load_state_dict(linear[0].state_dict())
    (mixture,) = (module for module in ours.modules() if isinstance(module, LoraMixture))
    if case == "equal scores":
        nn.init.zeros_(mixture.router.weight)
    theirs = with_our_weights(peft_lora(linear, 8, 24).double(), mixture)
    x = torch.randn(9, IN, dtype=torch.float64)
    exact = {"atol": 1e-13, "rtol": 1e-13} if case != "equal scores" else {"atol": 1e-6, "rtol": 1e-6}
    torch.testing.assert_close(ours(x), theirs(x), **exact)
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    layer = theirs.base_model.model[0]
    torch.testing.assert_close(mixture.lora_A.grad, layer.lora_A["default"].weight.grad, **exact)
    torch.testing.assert_close(mixture.lora_B.grad, layer.lora_B["default"].weight.grad, **exact)


def test_a_new_adapter_adds_nothing_and_learns() -> None:
    for config in CONFIGS.values():
        mixture = config.build(IN, OUT, LINEAR, "0")
        x, base = torch.randn(4, IN), torch.randn(4, OUT)
        assert torch.equal(mixture(base, x), base)
        mixture(base, x).sum().backward()
        assert mixture.lora_B.grad.abs().sum() > 0


def test_top_1_teaches_its_router_too() -> None:
    mixture = make_mixture(CONFIGS["mola_top1"])
    mixture(torch.zeros(20, OUT), torch.randn(20, IN)).square().sum().backward()
    assert mixture.router.weight.grad.abs().max() > 1e-3


def test_dropout_is_for_the_experts_alone() -> None:
    """Inputs of the experts are dropped; the choice does not change."""
    config = MolaConfig(r=2, experts=4, dropout=0.5)
    mixture, seen = make_mixture(config), []
    mixture.observe_routing(seen.append)
    x, base = torch.randn(50, IN), torch.zeros(50, OUT)
    outputs = [mixture(base, x) for _ in range(2)]
    assert not torch.equal(*outputs)
    assert torch.equal(seen[0].router_logits, seen[1].router_logits)
    assert torch.equal(mixture.eval()(base, x), mixture(base, x))
    mixture.train()
    with torch.no_grad():
        mean = torch.stack([mixture(base, x) for _ in range(800)]).mean(0)
    assert (mean - mixture.eval()(base, x)).abs().mean() < 0.1 * mean.abs().mean()


@pytest.mark.parametrize("case", ["smora", "mola", "soft", "hydra", "smora_unit"])
def test_autocast_and_half_precision_stay_near_float32(case: str) -> None:
    mixture = make_mixture(CONFIGS[case])
    x, base = torch.randn(30, IN), torch.randn(30, OUT)
    exact = mixture(base, x)
    seen = []
    mixture.observe_routing(seen.append)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = mixture(base.bfloat16(), x)
    half = mixture.bfloat16()(base.bfloat16(), x.bfloat16())
    for out in (under_autocast, half):
        assert (out.float() - exact).abs().mean() < 0.05 * exact.abs().mean()
    assert all(routing.router_logits.dtype == torch.float32 for routing in seen)
    nn.init.zeros_(mixture.float().lora_B)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mixture(base, x), base), "a layer that stays in float32 loses nothing"


def test_biases_move_the_load_towards_uniform_and_get_no_gradient() -> None:
    torch.manual_seed(0)
    mixture = SmoraConfig(r=16, top_k=4).build(IN, OUT, LINEAR, "0")
    # Skewed data: a constant direction favours some ranks.
    x = torch.randn(400, IN) * 0.3 + torch.linspace(-1, 1, IN)

    def spread() -> float:
        return mixture.router(x).column_counts().std().item()

    before = spread()
    for _ in range(60):
        mixture(torch.zeros(400, OUT), x).sum().backward()
        update_selection_biases(mixture, 2e-2)
    assert spread() < 0.3 * before
    assert not mixture.router.expert_bias.requires_grad
    assert "router.expert_bias" not in dict(mixture.named_parameters())
    assert mixture.bfloat16().router.expert_bias.dtype == torch.float32


def test_balance_loss_is_one_when_balanced_and_leaves_padding_out() -> None:
    mixture = make_mixture(MolaConfig(r=2, experts=4, aux_losses={"load_balancing": 0.5}))
    nn.init.zeros_(mixture.router.weight)
    x, mask = torch.randn(6, IN), torch.tensor([True, True, True, True, False, False])
    mixture(torch.zeros(6, OUT), x, mask)
    losses = collect_aux_losses(mixture)
    torch.testing.assert_close(losses.values["load_balancing"], torch.tensor(1.0))
    torch.testing.assert_close(losses.total.detach(), torch.tensor(0.5))
    nn.init.normal_(mixture.router.weight)
    values = []
    for padding in (torch.randn(2, IN), 100 * torch.randn(2, IN)):
        mixture(torch.zeros(6, OUT), torch.cat([x[:4], padding]), mask)
        values.append(collect_aux_losses(mixture).values["load_balancing"])
    mixture(torch.zeros(4, OUT), x[:4])
    values.append(collect_aux_losses(mixture).values["load_balancing"])
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(values[0], values[2])


def test_samples_are_the_rows_of_a_batch() -> None:
    mixture, seen = make_mixture(CONFIGS["mola"]), []
    mixture.observe_routing(seen.append)
    mixture(torch.zeros(2, 3, OUT), torch.randn(2, 3, IN))
    mixture(torch.zeros(3, OUT), torch.randn(3, IN))
    assert seen[0].sample_index.tolist() == [0, 0, 0, 1, 1, 1]
    assert seen[1].sample_index.tolist() == [0, 1, 2]


def test_a_router_of_another_kind_routes_by_itself() -> None:
    torch.manual_seed(0)
    mixture = LoraMixture(NoisyTopKRouter(IN, 4, 2), IN, OUT, rank=2, scaling=1.0, init_weights=False)
    nn.init.normal_(mixture.router.noise_weight)
    x, nothing = torch.randn(20, IN), torch.zeros(20, OUT)
    assert not torch.equal(mixture.train()(nothing, x), mixture(nothing, x)), "its noise is drawn"
    assert torch.equal(mixture.eval()(nothing, x), mixture(nothing, x))
