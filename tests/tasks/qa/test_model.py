"""The reader against transformers' own, its mixtures against loops, what answers depend on, and what is frozen."""

import copy
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from toys import CARD
from transformers import (
    AutoModelForQuestionAnswering,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    ElectraConfig,
    ElectraModel,
    GPT2Config,
    GPT2Model,
    RobertaConfig,
    RobertaModel,
    RobertaPreLayerNormConfig,
    RobertaPreLayerNormModel,
)

import zoo
from tasks.qa.model import Mixture, QAReader
from zoo.base_models import FREEZING
from zoo.errors import CheckpointError
from zoo.moe import MoELayer, TopKRouter, collect_aux_losses, load_balancing_loss, record_usage, routed_modules

VOCABULARY, DIM, HIDDEN, LAYERS, LONGEST = 40, 16, 24, 3, 32
# Weights as large as this make every part of the network matter.
SCALE = 0.4
SHARED = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": LONGEST,
    "initializer_range": SCALE,
    "pad_token_id": 0,
}
BERT = SHARED | {
    "hidden_size": DIM,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": HIDDEN,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
DISTILBERT = SHARED | {
    "dim": DIM,
    "n_layers": LAYERS,
    "n_heads": 2,
    "hidden_dim": HIDDEN,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "qa_dropout": 0.0,
}
# The first two are run through everything.
BASES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "bert": (BertModel, BertConfig, BERT),
    "distilbert": (DistilBertModel, DistilBertConfig, DISTILBERT),
    "roberta": (RobertaModel, RobertaConfig, BERT | {"max_position_embeddings": LONGEST + 2, "type_vocab_size": 1}),
    "electra": (ElectraModel, ElectraConfig, BERT | {"embedding_size": 8}),
    "roberta-prelayernorm": (RobertaPreLayerNormModel, RobertaPreLayerNormConfig, BERT | {"type_vocab_size": 1}),
    "dropout": (BertModel, BertConfig, BERT | {"hidden_dropout_prob": 0.5}),
    "distilbert-dropout": (DistilBertModel, DistilBertConfig, DISTILBERT | {"dropout": 0.5}),
    "qa-dropout": (DistilBertModel, DistilBertConfig, DISTILBERT | {"qa_dropout": 0.5}),
    "gelu_new": (BertModel, BertConfig, BERT | {"hidden_act": "gelu_new"}),
    "gpt2": (GPT2Model, GPT2Config, {"vocab_size": VOCABULARY, "n_embd": 8, "n_layer": 1, "n_head": 1}),
}
KINDS = list(product(("bert", "distilbert"), ("upcycled", "adapters")))
# For what takes longer: both layouts and both kinds of experts, each once.
FEW = [("bert", "upcycled"), ("distilbert", "adapters")]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bases")
    torch.manual_seed(1)
    for name, (model, config, arguments) in BASES.items():
        built = model(config(**arguments))
        with torch.no_grad():
            for parameter in built.parameters():
                # Biases, too.
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        built.save_pretrained(folder / name)
    return {name: str(folder / name) for name in BASES}


def reader(base: str, **arguments: Any) -> QAReader:
    torch.manual_seed(0)
    return QAReader(base, **arguments).eval()


def scrambled(model: QAReader) -> QAReader:
    """With all that is trained changed: experts, routers, LoRA and biases differ and matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def batch(lengths: tuple[int, ...] = (9, 5, 12), width: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Seeded windows; what lies in the padding is never read, so it is drawn as well."""
    width = width or max(lengths)
    generator = torch.Generator().manual_seed(7)
    rows = [torch.randint(2, VOCABULARY, (LONGEST,), generator=generator)[:width] for _ in lengths]
    places = torch.arange(width).expand(len(lengths), width)
    return torch.stack(rows), places < torch.tensor(lengths)[:, None], (places > 3).long()


def size(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def close(first: Tensor, second: Tensor, tolerance: float = 1e-5) -> bool:
    return torch.allclose(first, second, rtol=0, atol=tolerance)


# --- the start -------------------------------------------------------------------------------------------------------


def dense(base: str, model: QAReader) -> tuple[Tensor, Tensor]:
    """What transformers' own reader gives with this one's head."""
    torch.manual_seed(0)
    peer = AutoModelForQuestionAnswering.from_pretrained(base).eval()
    peer.qa_outputs.load_state_dict(model.span.state_dict())
    ids, mask, types = batch()
    types_if_known = {} if "distilbert" in base else {"token_type_ids": types if "roberta" not in base else 0 * types}
    with torch.no_grad():
        out = peer(input_ids=ids, attention_mask=mask, **types_if_known)
    return out.start_logits, out.end_logits


@pytest.mark.parametrize(("base", "experts"), KINDS)
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("mixture", [True, False])
def test_a_new_reader_is_its_base(bases, base, experts, top_k, mixture):
    model = reader(bases[base], experts=experts, top_k=top_k, mixture=mixture, lora_rank=2)
    _, mask, _ = batch()
    for got, expected in zip(model(*batch()), dense(bases[base], model), strict=True):
        assert expected.std() > 0.1
        assert close(got[mask], expected[mask])
        assert (got[~mask] == float("-inf")).all()


@pytest.mark.parametrize(("base", "experts"), KINDS)
@pytest.mark.parametrize(("top_k", "mixture"), [(1, True), (3, True), (1, False), (3, False)])
def test_a_mixture_starts_from_a_trained_reader(bases, base, experts, top_k, mixture):
    plain = scrambled(reader(bases[base], moe_layers=[], mixture=False))
    model = reader(bases[base], experts=experts, top_k=top_k, mixture=mixture)
    before = model(*batch())
    model.start_from(plain)
    _, mask, _ = batch()
    for got, expected, other in zip(model(*batch()), plain(*batch()), before, strict=True):
        assert close(got[mask], expected[mask]) and not close(got[mask], other[mask])


def test_a_head_starts_from_the_last_network_of_a_trained_reader(bases):
    plain = scrambled(reader(bases["bert"], moe_layers=[], mixture=False))
    model = reader(bases["bert"], placement="head")
    model.start_from(plain)
    ids, mask, types = batch()
    hidden = plain.encoder(input_ids=ids, attention_mask=mask, token_type_ids=types).last_hidden_state
    last = plain.encoder.encoder.layer[-1]
    own = last.output.dense(last.intermediate(hidden))
    start = plain.span(hidden + own)[..., 0]
    assert close(model(ids, mask, types)[0][mask], start[mask])


@pytest.mark.parametrize("theirs", ["nothing", "embeddings"])
@pytest.mark.parametrize("ours", ["embeddings", "base"])
def test_what_a_trained_reader_changed_of_the_base_is_saved_with_the_mixture(bases, ours, theirs, tmp_path):
    plain = reader(bases["bert"], moe_layers=[], mixture=False, freeze=theirs)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * name.startswith("encoder") * 0.3)
    zoo.save(plain, tmp_path / "plain", card=CARD)
    model = reader(bases["bert"], freeze=ours)
    model.start_from(zoo.load(tmp_path / "plain"))
    zoo.save(model, tmp_path / "mixture", card=CARD)
    loaded = zoo.load(tmp_path / "mixture")
    for got, expected in zip(loaded(*batch()), model(*batch()), strict=True):
        assert torch.equal(got, expected)
    assert loaded.freeze == ours and loaded.borrowed == model.borrowed == theirs
    kept = {name for name, parameter in loaded.named_parameters() if not parameter.requires_grad}
    assert kept == loaded.names_in(ours)


def test_what_no_mixture_starts_from(bases):
    plain = {"moe_layers": [], "mixture": False}
    for ours, theirs in (({}, {}), ({"lora_rank": 2}, plain), ({}, plain | {"lora_rank": 2})):
        with pytest.raises(ValueError, match=r"built with moe_layers=\[\] on the same base"):
            reader(bases["bert"], **ours).start_from(reader(bases["bert"], **theirs))
    with pytest.raises(ValueError, match="on the same base"):
        reader(bases["bert"]).start_from(reader(bases["dropout"], **plain))


@pytest.mark.parametrize("base", ["roberta", "electra", "roberta-prelayernorm"])
@pytest.mark.parametrize("experts", ["upcycled", "adapters"])
def test_further_encoders(bases, base, experts):
    model = reader(bases[base], experts=experts, lora_rank=2)
    ids, mask, types = batch()
    for got, expected in zip(model(ids, mask, types), dense(bases[base], model), strict=True):
        assert close(got[mask], expected[mask])
    assert len(model.read(ids, mask).routing) == 2


@pytest.mark.parametrize("base", ["bert", "distilbert"])
def test_one_expert_is_the_dense_network_exactly(bases, base):
    model = reader(bases[base], num_experts=1).double()
    plain = reader(bases[base], mixture=False).double()
    plain.span = model.span
    ids, mask, types = batch()
    for got, expected in zip(model(ids, mask, types), plain(ids, mask, types), strict=True):
        assert close(got[mask], expected[mask], 1e-12)


def test_without_mixtures_it_is_the_plain_encoder(bases):
    ids, mask, types = batch()
    for base in ("bert", "distilbert"):
        model = reader(bases[base], moe_layers=[], mixture=False, freeze="base")
        for got, expected in zip(model(ids, mask, types), dense(bases[base], model), strict=True):
            assert torch.equal(got[mask], expected[mask])
        assert model.state_dict().keys() == {"span.weight", "span.bias"}


def test_the_head_adds_one_mixture_to_what_it_reads(bases):
    ids, mask, types = batch()
    for residual, experts in ((True, "upcycled"), (False, "upcycled"), (True, "adapters")):
        model = reader(bases["bert"], placement="head", experts=experts, residual=residual)
        peer = BertModel.from_pretrained(bases["bert"]).eval()
        hidden = peer(input_ids=ids, attention_mask=mask, token_type_ids=types).last_hidden_state
        last = peer.encoder.layer[-1]
        added = last.output.dense(last.intermediate(hidden)) if experts == "upcycled" else 0 * hidden
        expected = model.span(added + hidden if residual else added)
        for got, wanted in zip(model(ids, mask, types), expected.unbind(-1), strict=True):
            assert close(got[mask], wanted[mask])
        assert list(model.read(ids, mask, types).routing) == ["head"]


def test_diversified_experts_differ_from_the_start(bases):
    for share in (0.0, 0.3):
        model = reader(bases["bert"], diversify=share)
        up = model.mixtures()["layer 2"].only_experts.up_proj
        base = BertModel.from_pretrained(bases["bert"]).encoder.layer[2].intermediate.dense.weight
        changed = (up != base).float().mean(dim=(1, 2))
        assert torch.allclose(changed, torch.full((4,), share), atol=0.08)
        assert torch.equal(up[0], up[1]) == (share == 0)


# --- the mixture -----------------------------------------------------------------------------------------------------


def by_hand(mixture: Mixture, x: Tensor, top_k: int, upcycled: bool) -> Tensor:
    """One token `(D,)` through its experts, one after another."""
    experts, gelu = mixture.experts.experts, nn.functional.gelu
    probabilities = (mixture.experts.router.weight @ x).softmax(0)
    chosen = probabilities.argsort(descending=True)[:top_k]
    weights = probabilities[chosen]
    if top_k > 1:
        weights = weights / weights.sum()
    elif upcycled:
        weights = torch.ones(1)
    out = torch.zeros_like(x)
    for weight, expert in zip(weights, chosen, strict=True):
        if upcycled:
            hidden = gelu(experts.up_proj[expert] @ x + experts.up_bias[expert])
            out += weight * (experts.down_proj[expert] @ hidden + experts.down_bias[expert])
        else:
            out += weight * (experts.down_proj[expert] @ gelu(experts.up_proj[expert] @ x))
    own = mixture.own
    return out if own is None else out + own.down_proj(gelu(own.up_proj(x)))


@pytest.mark.parametrize(("base", "experts"), KINDS)
@pytest.mark.parametrize("top_k", [1, 2])
def test_a_mixture_is_the_weighted_sum_of_the_chosen_experts(bases, base, experts, top_k):
    model = scrambled(reader(bases[base], experts=experts, top_k=top_k, expert_dim=5, moe_layers=[0, -1]))
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, mixture in model.mixtures().items():
        mixture.register_forward_hook(lambda _, x, out, name=name: seen.update({name: (x[0], out)}))
    ids, mask, types = batch()
    with torch.no_grad():
        reading = model.read(ids, mask, types)
        assert list(seen) == list(reading.routing) == ["layer 0", "layer 2"]
        for name, (x, out) in seen.items():
            mixture = model.mixtures()[name]
            assert (mixture.own is None) == (experts == "upcycled")
            for row, token in mask.nonzero():
                assert close(by_hand(mixture, x[row, token], top_k, experts == "upcycled"), out[row, token])
            index = reading.routing[name].expert_index.view(*mask.shape, top_k)
            assert (index[mask] < 4).all() and (index[~mask] == 4).all()


def test_reading_and_calling_agree_and_leave_nothing_behind(bases):
    model = scrambled(reader(bases["bert"]))
    reading = model.read(*batch())
    start, end = model(*batch())
    assert torch.equal(reading.start_logits, start) and torch.equal(reading.end_logits, end)
    assert not torch.equal(start, end)
    with pytest.raises(ValueError, match=r"33 tokens; .*bert reads at most 32"):
        model.read(*(torch.zeros(1, 33, dtype=torch.int64),) * 2)
    for layer in routed_modules(model).values():
        assert not layer._observers
    assert all(mixture.mask is None for mixture in model.mixtures().values())
    assert not reader(bases["bert"], mixture=False).read(*batch()).routing


def test_token_types_count_where_the_encoder_has_them(bases):
    ids, mask, types = batch()
    for base, counts in (("bert", True), ("electra", True), ("distilbert", False), ("roberta", False)):
        model = reader(bases[base])
        zeros, none, given = (model(ids, mask, value)[0] for value in (0 * types, None, types))
        assert torch.equal(zeros, none)
        assert torch.equal(given, none) != counts
        assert torch.equal(model(ids, mask.long(), types)[0], given)


@pytest.mark.parametrize(("base", "experts"), KINDS)
@pytest.mark.parametrize("changes", [{}, {"top_k": 2, "capacity_factor": 0.5}, {"placement": "head"}])
def test_a_window_depends_neither_on_its_batch_nor_on_padding(bases, base, experts, changes):
    model = scrambled(reader(bases[base], experts=experts, jitter=0.1, **changes))
    lengths = (9, 5, 12)
    ids, mask, types = batch(lengths)
    together = model.read(ids, mask, types)
    dropped = sum((found.expert_index[found.mask] == 4).sum() for found in together.routing.values())
    assert bool(dropped) == ("capacity_factor" in changes)
    wide = [nn.functional.pad(values, (0, 8), value=1) for values in (ids, types)]
    padded = model(wide[0], nn.functional.pad(mask, (0, 8)), wide[1])
    for row, length in enumerate(lengths):
        alone = model(ids[row : row + 1, :length], mask[row : row + 1, :length], types[row : row + 1, :length])
        for got, more, one in zip((together.start_logits, together.end_logits), padded, alone, strict=True):
            assert close(got[row, :length], one[0], 1e-4)
            assert close(more[row, :length], one[0], 1e-4)
            assert (got[row, length:] == float("-inf")).all() and (more[row, length:] == float("-inf")).all()
    assert all(torch.equal(*pair) for pair in zip(model(ids, mask, types), model(ids, mask, types), strict=True))


def test_padding_is_not_counted(bases):
    ids, mask, types = batch()
    losses = []
    for extra in (0, 8):
        model = scrambled(reader(bases["bert"], balance=0.5, top_k=2)).train()
        wide = [nn.functional.pad(values, (0, extra)) for values in (ids, mask, types)]
        with record_usage(model) as usages:
            routing = model.read(*wide).routing
        for usage in usages.values():
            assert usage.counts.sum() == 2 * mask.sum()
        expected = 0.5 * torch.stack([load_balancing_loss(found) for found in routing.values()]).mean()
        losses.append(collect_aux_losses(model).total.item())
        assert losses[-1] == pytest.approx(expected.item(), rel=1e-5)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0] > 0.5


@pytest.mark.parametrize(
    ("base", "arguments", "random"),
    [
        ("bert", {}, False),
        ("dropout", {}, True),
        ("distilbert-dropout", {}, True),
        ("qa-dropout", {}, True),
        ("bert", {"jitter": 0.5}, True),
    ],
)
def test_randomness_is_the_base_s_and_in_training_only(bases, base, arguments, random):
    model = scrambled(reader(bases[base], **arguments))
    assert torch.equal(model(*batch())[0], model(*batch())[0])
    model.train()
    assert torch.equal(model(*batch())[0], model(*batch())[0]) != random


# --- learning --------------------------------------------------------------------------------------------------------


def backward(model: QAReader, aux: bool = False) -> None:
    _, mask, _ = batch()
    loss = sum(logits[mask].square().mean() for logits in model(*batch()))
    extra = collect_aux_losses(model).total
    (loss + extra if aux else loss).backward()


@pytest.mark.parametrize(("base", "experts"), KINDS)
@pytest.mark.parametrize("changes", [{}, {"top_k": 4}, {"placement": "head"}, {"mixture": False, "top_k": 2}])
def test_everything_that_is_trained_learns_from_the_answers_alone(bases, base, experts, changes):
    model = scrambled(reader(bases[base], experts=experts, lora_rank=2, freeze="nothing", **changes)).train()
    backward(model)
    for name, parameter in model.named_parameters():
        if not name.endswith(("key.base_layer.bias", "k_lin.base_layer.bias")):  # no attention depends on it
            assert parameter.grad is not None and parameter.grad.abs().sum() > 1e-6, name


def test_the_only_weight_is_one_and_teaches_the_router_by_the_probability_s_logarithm(bases):
    model = scrambled(reader(bases["bert"], moe_layers=[2])).train()
    mixture = model.mixtures()["layer 2"]
    x, target = torch.randn(2, 6, DIM), torch.randn(2, 6, DIM)
    (mixture(x) * target).sum().backward()
    router = mixture.experts.router
    expected = torch.zeros_like(router.weight)
    with torch.no_grad():
        for unit, direction in zip(x.flatten(0, 1), target.flatten(0, 1), strict=True):
            probabilities = (router.weight @ unit).softmax(0)
            gain = by_hand(mixture, unit, 1, upcycled=True) @ direction
            rise = -probabilities
            rise[probabilities.argmax()] += 1
            expected += gain * rise[:, None] * unit
    assert expected.abs().max() > 0.1
    assert close(router.weight.grad, expected, 1e-4)
    assert (mixture.experts(x, return_routing=True)[1].expert_weight == 1).all()


def test_an_empty_slot_weighs_nothing(bases):
    model = scrambled(reader(bases["bert"], capacity_factor=0.5)).train()
    routing = model.read(*batch()).routing["layer 2"]
    empty = routing.expert_index == 4
    assert empty[routing.mask].any() and not empty.all()
    assert (routing.expert_weight == (~empty).float()).all()
    backward(model, aux=True)
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


def test_the_paper_s_router_is_used_where_its_weight_does_no_harm(bases):
    for experts, top_k, plain, normalised in (
        ("upcycled", 1, False, False),
        ("upcycled", 2, True, True),
        ("adapters", 1, True, False),
        ("adapters", 2, True, True),
    ):
        for mixture in reader(bases["bert"], experts=experts, top_k=top_k).mixtures().values():
            router = mixture.experts.router
            assert (type(router) is TopKRouter, router.normalize) == (plain, normalised)


# --- the twin --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("base", "experts"), FEW)
@pytest.mark.parametrize("top_k", [1, 3])
def test_the_twin_is_as_large_as_the_experts_that_read_a_token(bases, base, experts, top_k):
    for placement in ("inside", "head"):
        options = {"experts": experts, "top_k": top_k, "placement": placement, "expert_dim": 5}
        model, twin = (reader(bases[base], mixture=mixture, **options) for mixture in (True, False))
        assert not routed_modules(twin)
        for name, mixture in model.mixtures().items():
            active = size(mixture.experts.experts) * top_k // 4
            # Only the K output biases become one.
            assert active - size(twin.mixtures()[name].experts) == (top_k - 1) * DIM * (experts == "upcycled")
        counts = [size(each) - size(*each.mixtures().values()) for each in (model, twin)]
        assert counts[0] == counts[1]
        frozen = [{n for n, p in each.encoder.named_parameters() if not p.requires_grad} for each in (model, twin)]
        assert frozen[0] == frozen[1]


def test_the_twin_s_further_units_learn(bases):
    twin = reader(bases["bert"], mixture=False, top_k=2, moe_layers=[2]).train()
    wide = twin.mixtures()["layer 2"].experts
    optimizer = torch.optim.SGD(twin.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        backward(twin)
        optimizer.step()
    assert (wide.down_proj.weight[:, HIDDEN:].abs().sum(0) > 0).all()
    assert (wide.up_proj.weight.grad[HIDDEN:].abs().sum(1) > 0).all()
    assert not torch.allclose(wide.up_proj.weight[:HIDDEN], wide.up_proj.weight[HIDDEN:], atol=0.01)


# --- freezing --------------------------------------------------------------------------------------------------------


def expected_frozen(name: str, freeze: str, freeze_experts: bool, freeze_base: bool) -> bool:
    """By the name alone, as a person would say it."""
    if ".experts." in name:
        router = ".router." in name
        return freeze_experts and not router
    if not name.startswith("encoder."):
        return False
    if ".lora_" in name:
        return freeze_base
    return freeze_base or freeze == "base" or (freeze == "embeddings" and name.startswith("encoder.embeddings."))


@pytest.mark.parametrize(("base", "experts"), FEW)
@pytest.mark.parametrize("mixture", [True, False])
def test_frozen_is_bit_identical_and_all_else_moves(bases, base, experts, mixture):
    model = scrambled(reader(bases[base], experts=experts, lora_rank=2, mixture=mixture)).train()
    for freeze, freeze_experts, freeze_base in product(FREEZING, (False, True), (False, True)):
        model.refreeze(freeze, freeze_experts, freeze_base)
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            backward(model, aux=True)
            optimizer.step()
        optimizer.zero_grad()
        for name, parameter in model.named_parameters():
            frozen = expected_frozen(name, freeze, freeze_experts, freeze_base)
            assert torch.equal(parameter, before[name]) == frozen, name


def test_lora_is_added_to_the_attention_alone(bases):
    for base, count in (("bert", 4), ("distilbert", 4)):
        model = reader(bases[base], lora_rank=3)
        added = {name for name, _ in model.named_parameters() if ".lora_" in name}
        assert len(added) == LAYERS * count * 2
        assert all(".attention." in name for name in added)
        assert size(model) - size(reader(bases[base])) == LAYERS * count * 2 * 3 * DIM


def answers(model: QAReader) -> Tensor:
    with torch.no_grad():
        return torch.stack(model.eval()(*batch()))


@pytest.mark.parametrize(("base", "experts"), FEW)
@pytest.mark.parametrize("mixture", [True, False])
def test_a_checkpoint_holds_what_is_not_the_base_s(bases, tmp_path, base, experts, mixture):
    options = {"experts": experts, "freeze": "base", "lora_rank": 2, "mixture": mixture, "expert_dim": 8}
    model = scrambled(reader(bases[base], **options))
    folder = zoo.save(model, tmp_path / "reader", card=CARD, golden_input=batch())
    zoo.verify(folder)
    stored = load_file(folder / "model.safetensors")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert stored.keys() == trained
    loaded = zoo.load(folder)
    assert torch.equal(answers(loaded), answers(model))
    assert loaded.base_sha256 == model.base_sha256


def test_a_checkpoint_refuses_a_base_that_changed(bases, tmp_path):
    own = tmp_path / "base"
    BertModel.from_pretrained(bases["bert"]).save_pretrained(own)
    folder = zoo.save(reader(str(own)), tmp_path / "reader", card=CARD, golden_input=batch())
    changed = BertModel.from_pretrained(own)
    changed.embeddings.LayerNorm.bias.data += 1e-3
    changed.save_pretrained(own)
    for use in (zoo.load, zoo.verify):
        with pytest.raises(CheckpointError, match=r"^The base model .* has other weights"):
            use(folder)


@pytest.mark.parametrize(
    ("experts", "first", "second"),
    [
        ("upcycled", "nothing", "base"),
        ("upcycled", "embeddings", "base"),
        ("upcycled", "base", "nothing"),
        ("adapters", "base", "base"),
        ("adapters", "embeddings", "base"),
        ("adapters", "base", "embeddings"),
    ],
)
def test_a_second_stage_freezes_otherwise_and_loses_nothing(bases, tmp_path, experts, first, second):
    options = {"base": bases["bert"], "experts": experts, "lora_rank": 2}
    model = scrambled(reader(freeze=first, **options))
    loaded = reader(freeze=second, freeze_experts=True, freeze_base=True, **options)
    loaded.load_state_dict(model.state_dict())
    staged = copy.deepcopy(model)
    staged.refreeze(second, freeze_experts=True, freeze_base=True)
    for each in (loaded, staged):
        assert torch.equal(answers(each), answers(model))
        names = {name for name, parameter in each.named_parameters() if parameter.requires_grad}
        assert names == {name for name in names if not expected_frozen(name, second, True, True)} != set()
        assert each.state_dict().keys() == loaded.state_dict().keys()
        assert each.borrowed == loaded.borrowed
    again = zoo.load(zoo.save(loaded, tmp_path / "again", card=CARD))
    assert torch.equal(answers(again), answers(model))
    assert (again.freeze, again.freeze_experts, again.freeze_base) == (second, True, True)
    again.refreeze(freeze_base=False)
    assert again.freeze_experts and not again.freeze_base and again.freeze == second


def test_a_copy_is_a_reader_of_its_own(bases):
    model = scrambled(reader(bases["bert"], lora_rank=2))
    twin = copy.deepcopy(model)
    assert torch.equal(answers(twin), answers(model))
    scrambled(twin)
    assert not torch.equal(answers(twin), answers(model))
    holder = nn.ModuleDict({"reader": twin})
    holder.load_state_dict({f"reader.{key}": value for key, value in scrambled(model).state_dict().items()})
    assert holder.state_dict().keys() == {f"reader.{key}" for key in model.state_dict()}


# --- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"placement": "top"}, "Unknown placement 'top'.*Allowed: head, inside"),
        ({"experts": "copies"}, "Unknown kind of experts 'copies'.*adapters, upcycled"),
        ({"freeze": "all"}, "Unknown freezing 'all'"),
        ({"top_k": 5}, r"top_k=5: must be in 1..num_experts=4"),
        ({"top_k": 0, "mixture": False}, "top_k=0"),
        ({"expert_dim": 0}, "expert_dim=0"),
        ({"moe_layers": [3]}, r"moe_layers=\[3\]: name some of the layers -3..2"),
        ({"moe_layers": [-4]}, r"moe_layers=\[-4\]"),
        ({"moe_layers": [2, -1]}, "each once"),
        ({"moe_layers": []}, r"moe_layers=\[\]: no layer would get a mixture"),
        ({"moe_layers": [1], "placement": "head"}, "a head stands behind all layers"),
        ({"residual": False}, "is for placement='head'"),
        ({"residual": False, "placement": "head", "experts": "adapters"}, "would hide the encoder"),
        ({"capacity_factor": 0.0}, "capacity_factor"),
        ({"jitter": 1.0}, "jitter=1.0"),
        ({"balance": -1.0}, "-1.0"),
        ({"diversify": 2.0}, "ratio=2.0"),
        ({"lora_rank": -1}, "-1"),
    ],
)
def test_arguments_that_do_not_fit(bases, arguments, words):
    with pytest.raises(ValueError, match=words):
        reader(bases["bert"], **arguments)


def test_bases_that_do_not_fit(bases, monkeypatch):
    with pytest.raises(ValueError, match=r"is a GPT2Model: .* layers of BERT \(as RoBERTa and ELECTRA .* DistilBERT"):
        reader(bases["gpt2"])
    with pytest.raises(ValueError, match="activation 'gelu_new'; experts can have silu, gelu"):
        reader(bases["gelu_new"])
    monkeypatch.setattr("tasks.qa.model.ATTENTION", "nothing")
    with pytest.raises(ValueError, match="lora_rank=2: a BertModel has no attention projections"):
        reader(bases["bert"], lora_rank=2)


# --- the real one ----------------------------------------------------------------------------------------------------


def test_minilm_starts_as_itself_and_is_saved_small(minilm, tmp_path: Path):
    from zoo.base_models import find_base_model, load_tokenizer

    words = load_tokenizer(minilm)(
        ["Where was she born?", "Who?"],
        ["Marie Curie was born in Warsaw, then part of the Russian Empire.", "Nobody."],
        padding=True,
        return_tensors="pt",
    )
    inputs = (words["input_ids"], words["attention_mask"].bool(), words["token_type_ids"])
    model = reader(minilm, freeze="base", lora_rank=8)
    peer = AutoModelForQuestionAnswering.from_pretrained(find_base_model(minilm)).eval()
    peer.qa_outputs.load_state_dict(model.span.state_dict())
    with torch.no_grad():
        expected = peer(**words)
        got = model(*inputs)
    assert close(got[0][inputs[1]], expected.start_logits[inputs[1]])
    assert close(got[1][inputs[1]], expected.end_logits[inputs[1]])
    folder = zoo.save(model, tmp_path / "reader", card=CARD, golden_input=inputs, dtype=torch.float16)
    zoo.verify(folder)
    assert isinstance(model.mixtures()["layer 5"].experts, MoELayer)
    assert (folder / "model.safetensors").stat().st_size < 25e6
