"""Soft MoE against loops over samples, experts and slots."""

import pytest
import torch

from tests.zoo.moe.reference import expert_output
from zoo.moe import GroupedExperts, SoftMoELayer, collect_aux_losses, record_usage

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)


def make_layer(**options: object) -> SoftMoELayer:
    torch.manual_seed(0)
    layer = SoftMoELayer(GroupedExperts(3, 8, 16, bias=True), 2, **options)
    layer.scale.data.fill_(3.0)
    return layer


def test_matches_a_loop_and_reports_its_combine_weights() -> None:
    layer = make_layer()
    out, routing = layer(X, mask=MASK, return_routing=True)
    embedding = torch.nn.functional.normalize(layer.slot_embedding, dim=1)
    for sample, size in enumerate((5, 3)):
        x = X[sample, :size]
        logits = 3.0 * torch.nn.functional.normalize(x, dim=1) @ embedding.T
        dispatch, combine = torch.softmax(logits, 0), torch.softmax(logits, 1)
        slots = [expert_output(layer.experts, slot // 2, dispatch[:, slot] @ x) for slot in range(6)]
        torch.testing.assert_close(out[sample, :size], combine @ torch.stack(slots), atol=1e-5, rtol=1e-5)
        per_expert = combine.view(size, 3, 2).sum(2)
        torch.testing.assert_close(routing.router_probs[5 * sample : 5 * sample + size], per_expert)
    assert (out[~MASK] == 0).all()
    assert routing.expert_index.shape == (10, 0)


def test_no_leak_between_samples_and_a_sample_of_padding() -> None:
    layer = make_layer()
    alone = torch.cat([layer(X[i : i + 1], mask=MASK[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(layer(X, mask=MASK), alone)
    out = layer(X, mask=torch.zeros_like(MASK))
    out.sum().backward()
    assert (out == 0).all() and all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.grad is not None)


def test_losses_health_and_precision_as_in_any_routed_module() -> None:
    layer = make_layer(aux_losses={"load_balancing": 0.1, "z": 0.1, "importance": 0.1}).bfloat16()
    with record_usage(layer) as usages:
        out, routing = layer(X.bfloat16(), mask=MASK, return_routing=True)
    assert out.dtype == torch.bfloat16 and routing.router_logits.dtype == torch.float32
    values = collect_aux_losses(layer).values
    share = routing.router_probs[MASK.flatten()].mean(0)
    assert values["load_balancing"].item() == pytest.approx(3 * share.square().sum().item(), abs=1e-5)
    assert values["importance"].item() == pytest.approx(values["load_balancing"].item(), abs=1e-5)
    summary = usages[""].summary()
    assert summary["slots_per_unit"] == pytest.approx(1.0) and summary["dropped"] == pytest.approx(0.0, abs=1e-6)


def test_sequence_balancing_takes_each_samples_probabilities() -> None:
    layer = make_layer(aux_losses={"sequence_balancing": 1.0})
    _, routing = layer(X, mask=MASK, return_routing=True)
    loss = collect_aux_losses(layer).total
    means = [routing.router_probs[:5].mean(0), routing.router_probs[5:8].mean(0)]
    torch.testing.assert_close(loss, torch.stack([3 * mean.square().sum() for mean in means]).mean())
    loss.backward()
    assert layer.slot_embedding.grad is not None and layer.slot_embedding.grad.norm() > 0


@pytest.mark.parametrize("options", [{"bias": True}, {"gated": False, "out_dim": 6}])
def test_runs_dense_and_exports(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    layer = SoftMoELayer(GroupedExperts(3, 8, 16, **options), 2)
    expected = layer(X, mask=MASK)
    names = dict(layer.named_parameters())
    gradients = torch.autograd.grad(expected.square().sum(), names.values())
    layer.experts.backend = "dense"
    out = layer(X, mask=MASK)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), names.values()), gradients)
    assert layer(X[:0]).shape == (0, *expected.shape[1:])

    layer.eval()
    layer.experts.backend = "auto"
    sizes = {name: dict.fromkeys(range(2), torch.export.Dim.AUTO) for name in ("x", "mask")}
    exported = torch.export.export(layer, (), {"x": X, "mask": MASK}, dynamic_shapes=sizes).module()
    x, mask = torch.randn(4, 6, 8), torch.rand(4, 6) > 0.3
    torch.testing.assert_close(exported(x=x, mask=mask), layer(x, mask=mask))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="slots_per_expert=0"):
        SoftMoELayer(GroupedExperts(3, 8, 16), 0)
    with pytest.raises(ValueError, match=r"\(10, 8\) and None"):
        make_layer()(X.flatten(0, 1))
