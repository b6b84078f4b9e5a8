"""Which positions are padding reaches every layer of every network, in every forward, and nothing afterwards."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.zoo.lora.networks import make_base, make_config, make_inputs, old_name, output
from zoo.lora.padding import MAX_FORWARDS, PaddingMask
from zoo.moe import collect_aux_losses, record_usage, routed_modules

pytestmark = old_name

both = pytest.mark.parametrize("method", ["smora", "mola"])
transformers_only = pytest.mark.parametrize("network", ["bert", "llama", "gpt2"])


def units(model: nn.Module, *args: object, **kwargs: object) -> set[float]:
    """Units that each layer routed in one forward."""
    with record_usage(model) as usage:
        model(*args, **kwargs)
    return {one.units for one in usage.values()}


@both
@transformers_only
def test_layers_see_real_positions_only(method: str, network: str) -> None:
    model, inputs = get_peft_model(make_base(network), make_config(method, network)), make_inputs(network)
    assert units(model, **inputs) == {18}
    if network != "gpt2":
        # Its second argument is another one.
        assert units(model, inputs["input_ids"], inputs["attention_mask"]) == {18}
    assert units(model, input_ids=inputs["input_ids"]) == {21}, "nothing is left of the mask before"
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    assert units(model, inputs_embeds=embeddings, attention_mask=inputs["attention_mask"].bool()) == {18}
    assert units(model.base_model, **inputs) == {18} and units(model.get_base_model(), **inputs) == {18}


@both
def test_pooled_vectors_are_all_real(method: str) -> None:
    options = {"experts": 2} if method == "mola" else {}
    targets = ["query", "pooler.dense"]
    model = get_peft_model(make_base("bert"), make_config(method, "bert", target_modules=targets, **options))
    with record_usage(model) as usage:
        output(model, make_inputs("bert"))
    assert {(name.split(".")[-3], one.units) for name, one in usage.items()} == {("query", 18), ("dense", 3)}


@both
@transformers_only
def test_padding_changes_nothing(method: str, network: str) -> None:
    """What real positions give, losses and counts: the same with other tokens under the padding."""
    model = get_peft_model(make_base(network), make_config(method, network, aux_losses={"load_balancing": 1.0}))
    inputs = make_inputs(network)
    real = inputs["attention_mask"].bool()
    results = []
    for token in (5, 6):
        model.train()
        inputs["input_ids"] = inputs["input_ids"].masked_fill(~real, token)
        out = output(model, inputs)
        counts = [
            module.biased_router.window_counts.clone()
            for module in routed_modules(model).values()
            if module.biased_router is not None
        ]
        results.append((out if network == "bert" else out[real], collect_aux_losses(model).values, counts))
        for module in routed_modules(model).values():
            if module.biased_router is not None:
                module.biased_router.window_counts.zero_()
    torch.testing.assert_close(*results)


@both
def test_gradient_checkpointing_knows_the_mask_of_each_forward(method: str) -> None:
    """Three forwards of one step with three masks, recomputed when none of them runs any more."""
    inputs = make_inputs("llama")
    other = inputs["attention_mask"].clone()
    other[1, :5] = 0
    results = []
    for checkpointed in ("nothing", "layers", "network"):
        losses = {"load_balancing": 1.0, "sequence_balancing": 0.5, "z": 0.1}
        torch.manual_seed(1)
        model = get_peft_model(make_base("llama"), make_config(method, "llama", aux_losses=losses)).train()
        if checkpointed == "layers":
            model.gradient_checkpointing_enable()
        seen = []
        for module in routed_modules(model).values():
            module.observe_routing(lambda routing, seen=seen: seen.append(routing.num_units()))
        total = 0
        for weight, mask in ((1.0, inputs["attention_mask"]), (0.5, other), (0.3, None)):
            given = {"input_ids": inputs["input_ids"], "attention_mask": mask, "use_cache": False}
            out = checkpoint(model, use_reentrant=False, **given) if checkpointed == "network" else model(**given)
            total += weight * out.logits.square().mean()
        aux = collect_aux_losses(model)
        (total + aux.total).backward()
        assert not collect_aux_losses(model).values, "recomputing must not leave losses behind"
        assert len(seen) == 3 * 28
        assert len(model.base_model.padding.masks) == 3, "recomputing is no forward"
        counts = [m.biased_router.window_counts for m in routed_modules(model).values() if m.biased_router is not None]
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert len(gradients) == 28 * 3
        results.append((gradients, aux.values, counts))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(results[0], results[2], atol=1e-5, rtol=1e-4)


@both
def test_reentrant_checkpointing_is_an_error(method: str) -> None:
    """Its first pass runs without gradients, and its second one may not count again."""
    model = get_peft_model(make_base("llama"), make_config(method, "llama")).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="pass gradient_checkpointing_kwargs"):
        output(model, make_inputs("llama"))
    with torch.no_grad():
        output(model, make_inputs("llama"))
    model.eval()
    output(model, make_inputs("llama"))


def test_what_was_forgotten_is_an_error() -> None:
    """A forward whose backward comes after too many others."""
    model = get_peft_model(make_base("llama"), make_config("mola", "llama", aux_losses={})).train()
    model.gradient_checkpointing_enable()
    inputs = make_inputs("llama")
    late = output(model, inputs).sum()
    for _ in range(MAX_FORWARDS):
        model.base_model.padding.open(model.base_model.model, (), inputs)
        torch.zeros(1, requires_grad=True).exp()
    with pytest.raises(RuntimeError, match="its attention_mask is not known any more"):
        late.backward()


@both
def test_a_mask_of_another_form_is_an_error_in_training(method: str) -> None:
    model, inputs = get_peft_model(make_base("llama"), make_config(method, "llama")), make_inputs("llama")
    causal = torch.ones(3, 1, 7, 7, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match=r"attention_mask has shape \(3, 1, 7, 7\); expected \(batch, length\)"):
        model.train()(input_ids=inputs["input_ids"], attention_mask=causal)
    assert units(model.eval(), input_ids=inputs["input_ids"], attention_mask=causal) == {21}


@both
def test_a_failed_forward_leaves_no_mask(method: str) -> None:
    model, inputs = get_peft_model(make_base("bert"), make_config(method, "bert")), make_inputs("bert")
    with pytest.raises(IndexError):
        model(input_ids=inputs["input_ids"] + 1000, attention_mask=inputs["attention_mask"])
    assert model.base_model.padding.current is None


class Masked(nn.Module):
    """Hands what it is given to a function."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, look: object = None) -> None:
        look()


def test_units_are_found_in_any_shape_that_positions_have() -> None:
    network, ids = Masked(), torch.zeros(2, 3, dtype=torch.long)
    padding = PaddingMask(network)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    seen = []

    def look() -> None:
        seen.extend(padding.units(torch.zeros(*lead, 4)) for lead in ((2, 3), (6,), (2,), (3, 2)))

    network(ids, mask, look)
    assert [None if units is None else units.tolist() for units in seen] == [
        [True, True, False, False, True, True],
        [True, True, False, False, True, True],
        None,
        None,
    ]
    # With what came before in a cache: the mask of all positions, of which the last are run.
    seen.clear()
    network(ids, torch.cat([torch.zeros(2, 5, dtype=torch.long), mask], 1), look)
    assert seen[0].tolist() == [True, True, False, False, True, True]


def test_networks_without_a_mask_have_no_padding() -> None:
    network = make_base("mlp")
    padding = PaddingMask(network)
    network(torch.randn(2, 8))
    assert padding.units(torch.randn(2, 8)) is None
    assert padding.parameters == ["x"]
