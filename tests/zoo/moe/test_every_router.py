"""What holds for every router on every backend."""

import copy

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.zoo.moe.cases import CASES, make_router
from tests.zoo.moe.reference import double_loop
from zoo.errors import UnknownNameError
from zoo.moe import ROUTERS, GroupedExperts, MoELayer, Router, build_router, collect_aux_losses, open_count_windows
from zoo.moe.experts import BACKENDS
from zoo.moe.losses import LOSSES

every_router = pytest.mark.parametrize("case", CASES)
every_backend = pytest.mark.parametrize("backend", ["dense", "auto", *BACKENDS])

X = torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(1))
IDS = torch.randint(12, (3, 7), generator=torch.Generator().manual_seed(2))
MASK = torch.rand(3, 7, generator=torch.Generator().manual_seed(3)) > 0.3


def make_layer(case: str, backend: str = "auto", aux_losses: dict[str, float] | None = None) -> MoELayer:
    torch.manual_seed(0)
    router = make_router(case)
    return MoELayer(
        router, GroupedExperts(router.num_experts, 8, 16, bias=True, backend=backend), aux_losses=aux_losses
    )


def test_cases_cover_the_registry() -> None:
    assert {arguments["name"] for arguments in CASES.values()} == set(ROUTERS)
    with pytest.raises(UnknownNameError, match="'TopKRouter'"):
        build_router("TopkRouter")


@every_router
@every_backend
def test_equals_a_double_loop_forward_and_backward(case: str, backend: str) -> None:
    layer = make_layer(case, backend)
    out, routing = layer(X, mask=MASK, token_ids=IDS, return_routing=True)
    expected = double_loop(layer.experts, X.flatten(0, 1), routing)
    if routing.identity_weight is not None:
        expected = expected + routing.identity_weight[:, None] * X.flatten(0, 1)
    expected = expected.view_as(X)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=0)
    assert (out[~MASK] == 0).all()
    assert (routing.expert_index < routing.num_experts).any(), "an empty routing would prove nothing"

    target = torch.randn_like(out)
    names = {name: value for name, value in layer.named_parameters() if value.requires_grad}
    ours = torch.autograd.grad((out * target).sum(), list(names.values()), retain_graph=True, allow_unused=True)
    naive = torch.autograd.grad((expected * target).sum(), list(names.values()), allow_unused=True)
    for name, a, b in zip(names, ours, naive, strict=True):
        a, b = (torch.zeros(()) if value is None else value for value in (a, b))
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5, msg=name)


@every_router
@pytest.mark.parametrize("training", [True, False])
def test_the_routing_is_well_formed(case: str, training: bool) -> None:
    router = make_layer(case).train(training).router
    samples = torch.arange(3).repeat_interleave(7)
    routing = router(X.flatten(0, 1), mask=MASK.flatten(), sample_index=samples, token_ids=IDS.flatten())
    experts, columns, pad = routing.num_experts, routing.num_columns, ~MASK.flatten()
    assert routing.expert_index.dtype == torch.int64
    assert routing.expert_index.shape == routing.expert_weight.shape == routing.selected_index.shape
    assert routing.expert_index.min() >= 0 and routing.expert_index.max() <= experts
    assert routing.selected_index.max() <= columns
    empty = routing.expert_index == experts
    assert (routing.expert_weight[empty] == 0).all() and (routing.expert_weight[~empty] >= 0).all()
    assert empty[pad].all() and (routing.selected_index[pad] == columns).all()
    for row in routing.expert_index.tolist():
        chosen = [expert for expert in row if expert < experts]
        assert len(chosen) == len(set(chosen)), "no unit visits an expert twice"
    filled = routing.selected_index[~empty]
    assert torch.equal(filled, routing.expert_index[~empty]), "what is computed was selected"
    assert routing.router_logits.shape == routing.router_probs.shape == (21, columns)
    torch.testing.assert_close(routing.router_probs.sum(1), torch.ones(21))
    assert torch.equal(routing.sample_index, samples) and torch.equal(routing.mask, MASK.flatten())


@every_router
def test_permuting_samples_and_units_permutes_outputs(case: str) -> None:
    layer = make_layer(case).eval()
    out, samples = layer(X, token_ids=IDS), torch.tensor([2, 0, 1])
    torch.testing.assert_close(layer(X[samples], token_ids=IDS[samples]), out[samples], atol=1e-6, rtol=0)
    if case not in ("pre_gate", "capacity_position"):  # these read the order of a sample
        units = torch.randperm(7)
        torch.testing.assert_close(layer(X[:, units], token_ids=IDS[:, units]), out[:, units], atol=1e-6, rtol=0)


@every_router
def test_no_leak_between_batch_mates_in_eval(case: str) -> None:
    layer = make_layer(case).eval()
    together = layer(X, mask=MASK, token_ids=IDS)
    alone = [layer(X[i : i + 1], mask=MASK[i : i + 1], token_ids=IDS[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-6, rtol=0)


@every_router
def test_a_router_that_does_not_compare_units_takes_each_alone(case: str) -> None:
    layer = make_layer(case).eval()
    if layer.router.compares_units:
        with pytest.raises(ValueError, match="pass sample_index"):
            layer(X[0], token_ids=IDS[0])
        return
    torch.testing.assert_close(layer(X[0], token_ids=IDS[0]), layer(X, token_ids=IDS)[0], atol=1e-6, rtol=0)


@every_router
@every_backend
def test_all_padding_and_empty_batch(case: str, backend: str) -> None:
    layer = make_layer(case, backend, aux_losses={"load_balancing": 1.0, "z": 1.0, "entropy": 1.0, "importance": 1.0})
    out = layer(X, mask=torch.zeros_like(MASK), token_ids=IDS)
    assert out.shape == X.shape and (out == 0).all()
    loss = out.sum() + collect_aux_losses(layer).total
    loss.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in layer.parameters())
    assert layer(X[:0], token_ids=IDS[:0]).shape == (0, 7, 8)


@every_router
def test_state_dict_round_trip(case: str) -> None:
    layer = make_layer(case).eval()
    for buffer in layer.router.buffers():  # what training may have changed
        buffer.copy_((buffer + 1) % 4 if buffer.dtype == torch.int64 else torch.rand(buffer.shape) > 0.5)
    torch.manual_seed(7)
    router = make_router(case)
    fresh = MoELayer(router, GroupedExperts(router.num_experts, 8, 16, bias=True)).eval()
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(X, token_ids=IDS), layer(X, token_ids=IDS))


@every_router
def test_bfloat16_keeps_routing_in_float32(case: str) -> None:
    layer = make_layer(case, aux_losses={"load_balancing": 1.0, "z": 1.0}).bfloat16()
    out, routing = layer(X.bfloat16(), token_ids=IDS, return_routing=True)
    assert out.dtype == torch.bfloat16
    assert routing.router_logits.dtype == routing.router_probs.dtype == routing.expert_weight.dtype == torch.float32
    assert collect_aux_losses(layer).total.dtype == torch.float32


@every_router
@pytest.mark.parametrize("per_unit", [False, True])
def test_forbidden_experts_are_never_used(case: str, per_unit: bool) -> None:
    layer = make_layer(case)
    experts = layer.router.num_experts
    allowed = torch.arange(experts) < experts - 1
    if per_unit:
        allowed = torch.stack([allowed.roll(sample) for sample in range(3)]).repeat_interleave(7, 0)
    layer.expert_mask = allowed
    _, routing = layer(X, mask=MASK, token_ids=IDS, return_routing=True)
    used = torch.zeros(21, experts + 1, dtype=torch.bool).scatter(1, routing.expert_index, True)[:, :experts]
    assert not (used & ~allowed).any() and used.any()
    columns = routing.num_columns
    chosen = torch.zeros(21, columns + 1, dtype=torch.bool).scatter(1, routing.selected_index, True)[:, :experts]
    assert not (chosen & ~allowed).any(), "nor counted"


@every_router
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("allowed", ["one", "one_per_unit", "none_for_some", "none"])
def test_forbidden_experts_leave_every_loss_and_gradient_finite(case: str, training: bool, allowed: str) -> None:
    layer = make_layer(case).train(training)
    experts = layer.router.num_experts
    choices = {
        "one": torch.arange(experts) == 0,
        "one_per_unit": nn.functional.one_hot(torch.arange(21) % experts).bool(),
        "none_for_some": (torch.arange(21) % 3 > 0)[:, None].expand(21, experts),
        "none": torch.zeros(experts, dtype=torch.bool),
    }
    layer.expert_mask = choices[allowed]
    out, routing = layer(X, token_ids=IDS, return_routing=True)
    idle = ~layer.expert_mask.any(-1).expand(21)
    assert torch.isfinite(out).all() and (routing.expert_index[idle] == experts).all()
    if routing.identity_weight is None:
        assert (out.flatten(0, 1)[idle] == 0).all()
    total = out.square().sum()
    for name, loss in LOSSES.items():
        if name == "group_balancing" and routing.num_groups == 1:
            continue
        if name == "distillation" and routing.distilled_logits is None:
            continue
        value = loss(routing)
        assert torch.isfinite(value), name
        total = total + value
    total.backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name


@every_router
def test_a_decision_is_replayed_and_mapped(case: str) -> None:
    layer = make_layer(case)
    experts = layer.router.num_experts
    out, routing = layer(X, mask=MASK, token_ids=IDS, return_routing=True)
    other = make_layer("softmax" if experts == 4 else "threshold")
    other.experts.load_state_dict(layer.experts.state_dict())
    torch.testing.assert_close(other(X, routing=routing), out, atol=1e-6, rtol=0)
    moved = GroupedExperts(experts, 8, 16, bias=True)
    moved.load_state_dict({name: value.flip(0) for name, value in layer.experts.state_dict().items()})
    mapped = MoELayer(layer.router, moved, expert_map=list(range(experts))[::-1])
    torch.testing.assert_close(mapped(X, routing=routing), out, atol=1e-6, rtol=0)


@every_router
def test_every_parameter_of_router_and_experts_gets_a_gradient(case: str) -> None:
    aux = {"load_balancing": 0.1, "z": 0.1, **({"distillation": 0.1} if case == "stable" else {})}
    layer = make_layer(case, aux_losses=aux)
    x, ids = torch.randn(8, 30, 8), torch.randint(12, (8, 30))
    state = torch.randn(240, 6) if case.startswith("recurrent") else None
    for _ in range(8):  # a random router does not reach every expert at once
        (layer(x, token_ids=ids, state=state).square().sum() + collect_aux_losses(layer).total).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.norm() > 0, name


@every_router
def test_losses_ignore_padding_and_reach_the_router(case: str) -> None:
    layer = make_layer(case).eval()
    padded = layer(
        torch.cat([X, torch.randn(3, 2, 8)], 1),
        mask=torch.arange(9).expand(3, 9) < 7,
        return_routing=True,
        token_ids=torch.cat([IDS, IDS[:, :2]], 1),
    )[1]
    real = layer(X, token_ids=IDS, return_routing=True)[1]
    for name, loss in LOSSES.items():
        if name == "group_balancing" and real.num_groups == 1:
            continue
        if name == "distillation" and real.distilled_logits is None:
            continue
        torch.testing.assert_close(loss(padded), loss(real), atol=1e-5, rtol=1e-5, msg=name)


@every_router
def test_copies_route_alike(case: str) -> None:
    layer = make_layer(case).eval()
    assert torch.equal(copy.deepcopy(layer)(X, token_ids=IDS), layer(X, token_ids=IDS))


def test_causal_models_refuse_routers_that_see_the_future() -> None:
    refused = {case for case in CASES if make_router(case).noncausal}
    assert refused == {"capacity_probs", "capacity_position", "expert_choice", "pooled", "pooled_null_identity"}
    for case in refused:
        with pytest.raises(ValueError, match="later"):
            MoELayer(make_router(case), GroupedExperts(4, 8, 16), causal=True)
    forced = build_router("ExpertChoiceRouter", input_dim=8, num_experts=4, allow_causal=True)
    MoELayer(forced, GroupedExperts(4, 8, 16), causal=True)


@pytest.mark.parametrize("case", [case for case in CASES if not make_router(case).noncausal])
def test_routers_that_causal_models_take_do_not_see_the_future(case: str) -> None:
    layer: nn.Module = make_layer(case).eval()
    early: Tensor = layer(X[:, :4], token_ids=IDS[:, :4])
    torch.testing.assert_close(layer(X, token_ids=IDS)[:, :4], early, atol=1e-6, rtol=0)


@every_router
def test_gradient_checkpointing_changes_nothing(case: str) -> None:
    aux = {"load_balancing": 1.0, "z": 1.0, "entropy": 1.0}
    results = []
    for checkpointed in (False, True):
        layer = make_layer(case, aux_losses=aux)
        open_count_windows(layer)
        torch.manual_seed(5)
        out = checkpoint(layer, X, token_ids=IDS, use_reentrant=False) if checkpointed else layer(X, token_ids=IDS)
        losses = collect_aux_losses(layer)
        (out.square().sum() + losses.total).backward()
        assert not collect_aux_losses(layer).values, "the recomputed forward leaves nothing behind"
        results.append([losses.total.detach(), layer.count_window.total, *(p.grad for p in layer.parameters())])
    for plain, recomputed in zip(*results, strict=True):
        assert plain is recomputed is None or torch.equal(plain, recomputed)


@every_router
def test_autocast_keeps_routing_in_float32(case: str) -> None:
    layer = make_layer(case).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, routing = layer(X, token_ids=IDS, return_routing=True)
    exact = layer(X, token_ids=IDS, return_routing=True)[1]
    tolerance = 1e-2 if case == "pre_gate" else 1e-6  # its causal network is no score and may be cast
    assert routing.router_logits.dtype == torch.float32
    torch.testing.assert_close(routing.router_logits, exact.router_logits, atol=tolerance, rtol=0)


@every_router
def test_can_be_written_in_yaml(case: str) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Router, "router")
    config = {"router": as_class_path(CASES[case])}
    router = parser.instantiate_classes(parser.parse_object(config)).router
    assert {name: value.shape for name, value in router.state_dict().items()} == {
        name: value.shape for name, value in make_router(case).state_dict().items()
    }


def as_class_path(arguments: dict[str, object]) -> dict[str, object]:
    """The same router as LightningCLI spells it."""
    nested = {key: as_class_path(value) if key == "inner" else value for key, value in arguments.items()}
    name = nested.pop("name")
    if name == "RecurrentRouter":
        nested["cell"] = {"class_path": "torch.nn.GRUCell", "init_args": {"input_size": 5, "hidden_size": 6}}
    return {"class_path": f"zoo.moe.{name}", "init_args": nested}


SIZES = {"input_dim": 8, "num_experts": 4}


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("TopKRouter", {**SIZES, "top_k": 2, "capacity_factor": 1.0}, "capacity_factor=1.0: needs a drop_policy"),
        ("TopKRouter", {**SIZES, "top_k": 2, "eval_capacity_factor": 1.0}, "eval_capacity_factor=1.0: needs"),
        ("TopKRouter", {**SIZES, "top_k": 2, "capacity_factor": -1, "drop_policy": "probs"}, "capacity_factor=-1"),
        ("TopKRouter", {**SIZES, "top_k": 2, "drop_policy": "last"}, "drop_policy='last': must be one of"),
        ("TopKRouter", {**SIZES, "top_k": 1, "random_second": True}, "random_second=True: needs top_k=2, not 1"),
        ("CosineRouter", {**SIZES, "top_k": 2, "temperature": 0}, "temperature=0"),
        ("CosineRouter", {**SIZES, "top_k": 2, "project_dim": 0}, "project_dim=0"),
        ("CosineRouter", {"input_dim": 0, "num_experts": 4, "top_k": 2}, "input_dim=0"),
        ("TopPRouter", {**SIZES, "p": 0}, r"p=0: must be in \(0, 1\]"),
        ("TopPRouter", {**SIZES, "max_k": 5}, "max_k=5: must be in 1..num_experts=4"),
        ("NullExpertRouter", {**SIZES, "top_k": 7, "num_null": 2}, "top_k=7: must not exceed 6 columns"),
        ("NullExpertRouter", {**SIZES, "top_k": 2, "num_null": 0}, "num_null=0"),
        ("NullExpertRouter", {**SIZES, "top_k": 2, "num_null": 1, "null_kind": "one"}, "null_kind='one'"),
        ("DenseToSparseRouter", {**SIZES, "temperature": -1}, "temperature=-1"),
        ("DenseToSparseRouter", {**SIZES, "threshold": 0.3}, "threshold=0.3"),
        ("ExpertChoiceRouter", {**SIZES, "capacity_factor": 5}, "capacity_factor=5"),
        ("BaseRouter", {**SIZES, "tolerance": 0}, "tolerance=0"),
        ("StableMoERouter", {**SIZES, "vocab_size": 0}, "vocab_size=0"),
        ("StableMoERouter", {**SIZES, "vocab_size": 9, "student_dim": 0}, "student_dim=0"),
        ("StochasticRouter", {"num_experts": 4, "inference": "batch"}, "inference='batch'"),
        ("StochasticRouter", {"num_experts": 0}, "num_experts=0"),
        (
            "PreGateRouter",
            {"inner": {"name": "DenseRouter", "num_experts": 4}, "input_dim": 8, "hidden_dim": 0},
            "hidden",
        ),
        ("PooledRouter", {"inner": {"name": "TopKRouter", **SIZES, "top_k": 5}}, "top_k=5"),
        (
            "RecurrentRouter",
            {"inner": {"name": "DenseRouter", "num_experts": 4}, "input_dim": 0, "cell": nn.GRUCell(5, 6)},
            "input_dim=0",
        ),
    ],
)
def test_bad_arguments_name_argument_value_and_rule(name: str, arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_router(name, **arguments)


def export(layer: MoELayer, **inputs: Tensor) -> nn.Module:
    """The exported layer; the sizes of all leading dimensions stay free."""
    sizes = {name: dict.fromkeys(range(min(value.ndim, 2)), torch.export.Dim.AUTO) for name, value in inputs.items()}
    return torch.export.export(layer, (), inputs, dynamic_shapes=sizes).module()


def random_inputs(batch: int, length: int) -> dict[str, Tensor]:
    shape, generator = (batch, length), torch.Generator().manual_seed(4)
    return {
        "x": torch.randn(*shape, 8, generator=generator),
        "mask": torch.rand(shape, generator=generator) > 0.3,
        "token_ids": torch.randint(12, shape, generator=generator),
    }


@pytest.mark.parametrize("case", [case for case in CASES if case != "pre_gate"])
def test_exports_in_eval_mode(case: str) -> None:
    layer = make_layer(case).eval()
    exported = export(layer, x=X, mask=MASK, token_ids=IDS)
    inputs = random_inputs(5, 6)
    torch.manual_seed(6)
    out = exported(**inputs)
    torch.manual_seed(6)
    torch.testing.assert_close(out, layer(**inputs), atol=2e-6, rtol=0)
    assert out.abs().sum() > 0


def test_a_pre_gate_exports_behind_its_causal_network() -> None:
    layer = make_layer("pre_gate").eval()
    with pytest.raises(ValueError, match="export the layer with what it gives as `state`"):
        export(layer, x=X, mask=MASK)
    x, state = torch.randn(11, 8), torch.randn(11, 6)
    exported = export(
        layer, x=X.flatten(0, 1), sample_index=torch.zeros(21, dtype=torch.int64), state=torch.randn(21, 6)
    )
    sample = torch.arange(11) // 4
    torch.testing.assert_close(
        exported(x=x, sample_index=sample, state=state), layer(x, sample_index=sample, state=state), atol=2e-6, rtol=0
    )


@pytest.mark.parametrize(
    ("case", "buffer", "value"), [("stable", "frozen", True), ("dense_to_sparse_dense_eval", "temperature", 0.0)]
)
def test_what_is_exported_follows_the_buffers_of_the_router(case: str, buffer: str, value: float) -> None:
    layer = make_layer(case).eval()
    inputs = random_inputs(5, 6)
    exported = export(layer, x=X, mask=MASK, token_ids=IDS)
    before = layer(**inputs)
    for module in (layer, exported):
        module.get_buffer(f"router.{buffer}").fill_(value)
    torch.testing.assert_close(exported(**inputs), layer(**inputs), atol=2e-6, rtol=0)
    assert not torch.allclose(layer(**inputs), before, atol=1e-3)


@pytest.mark.parametrize("case", ["softmax", "sigmoid_bias_groups", "cosine", "top_p", "null_identity", "recurrent"])
def test_compiles_without_graph_breaks_in_the_dense_backend(case: str) -> None:
    layer = make_layer(case, "dense").eval()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), layer(X), atol=1e-6, rtol=0)
