"""DMoERM against PEFT and transformers, what each phase leaves alone, and what a reward depends on."""

import copy
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, inject_adapter_in_model
from toys import CARD

import zoo
from tasks.reward.backbone import bert_layer, pool_states
from tasks.reward.baselines import LoraEnsemble, ObjectiveModel, reduce_members
from tasks.reward.lora import LoraExperts, attached
from tasks.reward.model import PHASES, DMoERM, InnerModel
from tests.tasks.reward.builders import CAPABILITIES, GROUPS, inputs_of, save_base, save_llama, stir, texts
from zoo import hub
from zoo.base_models import load_encoder
from zoo.errors import UnknownNameError

# Which of the two inner models each of six texts goes to.
ROUTES = [0, 1, 1, 0, 1, 0]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of a BERT and a Llama."""
    folder = tmp_path_factory.mktemp("bases")
    return {"bert": save_base(folder / "bert"), "llama": save_llama(folder / "llama")}


def dmoerm(base, **changes):
    return DMoERM(GROUPS, list(CAPABILITIES), base, aggregate_dim=8, router_dim=8, **changes)


def count_trained(model):
    """Parameters that any phase trains."""
    return sum({id(p): p.numel() for phase in model.phases for p in model.phase_parameters(phase)}.values())


def peft_state(base, found, groups):
    """The last state that PEFT gives with some LoRAs added up, each in the form `{name: (A, B, scaling)}`."""
    model = load_encoder(base)
    names = list(dict.fromkeys(name for group in groups for name in group))
    rank = [group[next(iter(group))][0].shape[0] for group in groups]
    # One LoRA of all ranks: their products add up.
    scaled = {
        name: (
            torch.cat([group[name][0] for group in groups if name in group]),
            torch.cat([group[name][1] * group[name][2] for group in groups if name in group], dim=1),
        )
        for name in names
    }
    total = sum(rank)
    wrapped = inject_adapter_in_model(LoraConfig(r=total, lora_alpha=total, target_modules=names), model)
    for name, (first, second) in scaled.items():
        layer = wrapped.get_submodule(name)
        missing = total - first.shape[0]
        layer.lora_A["default"].weight.data = torch.cat([first, first.new_zeros(missing, first.shape[1])])
        layer.lora_B["default"].weight.data = torch.cat([second, second.new_zeros(second.shape[0], missing)], dim=1)
    types = {} if model.config.model_type == "llama" else {"token_type_ids": found["type_ids"]}
    with torch.no_grad():
        states = wrapped(input_ids=found["input_ids"], attention_mask=found["mask"].long(), **types).last_hidden_state
    if model.config.model_type == "llama":
        return states[torch.arange(len(states)), found["mask"].sum(1) - 1]
    return states[:, 0]


def matrices(model, experts: LoraExperts, number):
    """The LoRAs of one expert by the base's names of the layers."""
    found = {}
    for name, stack in experts.stacks.items():
        layer, _, path = name.partition("-")
        # Names in a ModuleDict have no dots.
        parts = [p for p, _ in model.encoder.get_submodule(f"{model.kind}.{layer}").named_modules()]
        path = next(p.removesuffix(".base") for p in parts if p.removesuffix(".base").replace(".", "-") == path)
        found[f"{model.kind}.{layer}.{path}"] = (
            stack.lora_A[number].detach(),
            stack.lora_B[number].detach(),
            stack.scaling,
        )
    return found


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize(("task", "capability"), [(1, 1), (2, 1), (1, 2), (0, 0)])
def test_one_stacked_pass_is_one_pass_of_peft_for_each_expert(bases, kind, task, capability):
    base = bases[kind]
    model = stir(dmoerm(base, task_layers=task, capability_layers=capability, task_rank=3, capability_rank=2)).eval()
    found = texts()
    inputs = inputs_of(model, found, ROUTES)
    for inner in model.inner:
        own = matrices(model, inner.task, 0)
        with torch.no_grad():
            states = inner.states(inputs.streams)
            single = inner.finish(inputs.streams, (inner.task,))[:, 0]
            assert torch.equal(states[..., model.dim :], inputs.means[:, None].expand(-1, len(CAPABILITIES), -1))
        single, states = single[..., : model.dim], states[..., : model.dim]
        torch.testing.assert_close(single, peft_state(base, found, [own]), atol=1e-4, rtol=1e-4)
        for number in range(len(CAPABILITIES)):
            expected = peft_state(base, found, [own, matrices(model, inner.experts, number)])
            torch.testing.assert_close(states[:, number], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("capability", [1, 2])
def test_the_first_token_alone_learns_as_among_all_tokens(bases, capability):
    model = stir(dmoerm(bases["bert"], capability_layers=capability))
    inner, layer = model.inner[0], model.encoder.get_submodule(model.kind)[-1]
    inputs = inputs_of(model, texts(), ROUTES)
    experts = (inner.task, inner.experts)
    model.apply_phase(None)
    for part in experts:
        part.requires_grad_(True)
    found = []
    for pooled in (True, False):
        with attached(model.adapted, experts, len(ROUTES)):
            hidden = model.run(inputs.hidden, inputs.mask, range(model.first, model.depth - 1))
            state = bert_layer(layer, hidden, inputs.mask, pooled)[:, 0]
        state.square().sum().backward()
        grads = {name: p.grad for name, p in inner.named_parameters() if p.grad is not None}
        assert len(grads) >= 4 * 6 and all(grad.any() for grad in grads.values())
        found.append((state.detach(), grads))
        inner.zero_grad()
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_an_untrained_model_is_its_base_and_reads_prompts_as_it_does(bases, kind):
    model, found = dmoerm(bases[kind]).eval(), texts()
    inputs = inputs_of(model, found, ROUTES)
    expected = peft_state(bases[kind], found, [matrices(model, model.inner[0].task, 0)])
    with torch.no_grad():
        for inner in model.inner:
            for state in inner.states(inputs.streams)[..., : model.dim].unbind(1):
                torch.testing.assert_close(state, expected, atol=1e-5, rtol=1e-4)
        base = load_encoder(bases[kind])
        asked = {"input_ids": found["prompt_ids"], "attention_mask": found["prompt_mask"].long()}
        depths = base(**asked, output_hidden_states=True).hidden_states
    assert model.prompt_depths == (0, 1, 2, 3) and len(depths) == 4
    means = [states.mean(1) for states in depths]
    normal = [(of - of.mean(1, keepdim=True)) / (of.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt() for of in means]
    torch.testing.assert_close(inputs.prompts, torch.cat(normal, dim=1), atol=1e-4, rtol=1e-4)


def test_means_are_those_of_a_loop_over_texts(bases):
    model, found = dmoerm(bases["bert"]), texts()
    hidden = model.prefix(found["input_ids"], found["mask"], found["type_ids"])
    # Padding, and a text without an answer.
    hidden[~found["mask"]] = 1e4
    found["type_ids"][2] = 0
    for row, mean in enumerate(pool_states(hidden, found["mask"], found["type_ids"])):
        of = hidden[row][found["mask"][row]]
        answer = of[found["type_ids"][row][: len(of)] == 1]
        for part, states in zip(mean.split(model.dim), (of, answer), strict=True):
            expected = states.mean(0) if len(states) else torch.zeros(model.dim)
            expected = (expected - expected.mean()) / (expected.var(unbiased=False) + 1e-5).sqrt()
            torch.testing.assert_close(part, expected, atol=1e-4, rtol=1e-4)


def dmoerm_of(base, aggregate, linear, names=CAPABILITIES, **changes):
    """One that combines by an MLP, or by a linear map."""
    return DMoERM(GROUPS, list(names), base, aggregate=aggregate, aggregate_dim=0 if linear else 8, **changes)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("aggregate", ["hidden", "score"])
def test_rewards_are_those_of_each_texts_own_inner_model(bases, aggregate, linear):
    model, found = stir(dmoerm_of(bases["bert"], aggregate, linear)).eval(), texts()
    inputs = inputs_of(model, found, ROUTES)
    with torch.no_grad():
        # Half of the prompts to each.
        features = model.prompt_body(inputs.prompts)
        normal = torch.linalg.lstsq(features, torch.tensor([1.0, 1, -1, -1, 1, -1])[:, None]).solution[:, 0]
        model.outer.router.weight.copy_(torch.stack([normal, -normal]))
        oracle, predicted = model.read(inputs, oracle=True), model.read(inputs)
        route = model.route(inputs.prompts).argmax(1)
        assert torch.equal(predicted.route, route) and len(route.unique()) == 2
        for number in range(len(ROUTES)):
            for reading, group in ((oracle, ROUTES[number]), (predicted, int(route[number]))):
                inner = model.inner[group]
                states = inner.states(tuple(part[number : number + 1] for part in inputs.streams))
                scores = (states * inner.experts.head).sum(-1)
                last = states[..., : model.dim].flatten(1)
                read = torch.cat([last, inputs.means[number][None]], 1) if aggregate == "hidden" else scores
                if linear:
                    expected = read @ inner.combine.weight.T
                else:
                    first, act, second = inner.combine
                    expected = second(torch.nn.functional.prelu(first(read), act.weight))
                torch.testing.assert_close(reading.reward[number], expected[0, 0], atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(reading.scores[number], scores[0], atol=1e-4, rtol=1e-4)
        # A text whose category is not known goes where the router sends it.
        unknown = model.read(inputs_of(model, found, [-1] * 6), oracle=True)
        torch.testing.assert_close(unknown.reward, predicted.reward)
        torch.testing.assert_close(model(**found), predicted.reward)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_reward_depends_on_no_batch_mate_and_no_padding(bases, kind):
    model, found = stir(dmoerm(bases[kind])).eval(), texts()
    with torch.no_grad():
        together = model(**found)
        for number in range(len(together)):
            size = int(found["mask"][number].sum())
            alone = {name: tensor[number : number + 1] for name, tensor in found.items()}
            alone |= {name: alone[name][:, :size] for name in ("input_ids", "mask", "type_ids")}
            torch.testing.assert_close(model(**alone)[0], together[number], atol=1e-4, rtol=1e-4)


def step(model, phase, inputs, preferences, steps=3):
    """A few optimiser steps of a phase."""
    model.begin(phase)
    model.apply_phase(phase)
    optimizer = torch.optim.AdamW(model.phase_parameters(phase), lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        loss, _ = model.phase_loss(phase, inputs, preferences)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("aggregate", ["hidden", "score"])
def test_each_phase_leaves_all_else_byte_identical(bases, aggregate, shared):
    linear = aggregate == "score"
    general = 4 if shared else 0
    model = dmoerm_of(bases["bert"], aggregate, linear, share_capabilities=shared, general_rank=general)
    found = texts()
    inputs = inputs_of(model, found, [0, 1, 1, 0, 1, 1])
    preferences = torch.tensor([[1, -1], [0, 1], [-1, 0]], dtype=torch.int8)
    base = {name: tensor.clone() for name, tensor in model.encoder.state_dict().items()}
    phases = [phase for phase in PHASES if linear or phase != "weigh"]
    for phase in phases:
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        step(model, phase, inputs, preferences)
        own = {id(parameter) for parameter in model.phase_parameters(phase)}
        moved = {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
        parts = {name for name, p in model.named_parameters() if id(p) in own}
        if phase == "task":
            assert moved <= parts
        # A phase's own start is part of it: heads are copied.
        assert moved <= parts and moved, (phase, moved - parts)
        assert any("lora_A" in name for name in moved) == (phase in ("joint", "task", "capability"))
        assert any("combine" in name for name in moved) == (phase == "aggregate")
        assert any(name.endswith("weights") for name in moved) == (phase == "weigh")
        assert any("router" in name for name in moved) == (phase == "router")
    for name, tensor in model.encoder.state_dict().items():
        assert torch.equal(base[name], tensor), name


def test_phases_start_from_one_another(bases):
    model = dmoerm(bases["bert"])
    inputs = inputs_of(model, texts(), [0, 0, 0, 0, 0, 0])
    preferences = torch.ones(3, 2, dtype=torch.int8)
    step(model, "joint", inputs, preferences)
    model.begin("task")
    first, second = model.inner
    for name, value in first.task.state_dict().items():
        assert torch.equal(value, second.task.state_dict()[name])
    step(model, "task", inputs, preferences)
    model.begin("capability")
    for inner in model.inner:
        assert all(torch.equal(head, inner.task.head[0]) for head in inner.experts.head)
    # Only the first inner model has pairs, so only it has learned in the phase `task`.
    assert not torch.equal(first.task.head, second.task.head)


def test_a_step_moves_a_layer_equally_far_at_any_rank(bases):
    """So that one learning rate suits all: Adam's first step moves every weight of B by the rate."""
    moved = []
    for rank in (2, 16):
        stack = next(iter(dmoerm(bases["bert"], task_rank=rank).inner[0].task.stacks.values()))
        with torch.no_grad():
            stack.lora_A.fill_(1.0)
        optimizer = torch.optim.Adam([stack.lora_B], lr=1e-2)
        result, x = torch.zeros(1, 1, stack.lora_B.shape[1]), torch.ones(1, 1, stack.lora_A.shape[2])
        stack(result, x, 1).sum().backward()
        optimizer.step()
        moved.append(stack(result, x, 1).detach())
    assert moved[0].abs().min() > 0
    torch.testing.assert_close(*moved)


def test_the_expert_of_the_preference_is_the_task_model_whatever_is_trained(bases):
    model = DMoERM(GROUPS, ["length", "preference"], bases["bert"], aggregate="score", aggregate_dim=0)
    inputs = inputs_of(model, texts(), ROUTES)
    # Of the preference there are no labels.
    preferences = torch.tensor([[1, 0], [-1, 0], [1, 0]], dtype=torch.int8)
    # The second time as a trained model goes on: with other task models, and no start of the phases.
    for begin in (True, False):
        for phase in ("task", "capability"):
            if begin:
                model.begin(phase)
            model.apply_phase(phase)
            optimizer = torch.optim.AdamW(model.phase_parameters(phase), lr=1e-2, weight_decay=0.5)
            for _ in range(3):
                optimizer.zero_grad()
                model.phase_loss(phase, inputs, preferences)[0].backward()
                optimizer.step()
        with torch.no_grad():
            for inner in model.inner:
                scores = inner.capability_scores(inputs.streams)
                wanted = inner.task_rewards(inputs.streams)
                torch.testing.assert_close(scores[:, 1], wanted, atol=1e-5, rtol=1e-4)
                assert not torch.allclose(scores[:, 0], wanted, atol=1e-3)


def test_experts_that_share_a_batch_learn_as_if_alone(bases):
    both, alone = (dmoerm(bases["bert"]) for _ in range(2))
    alone.load_state_dict(both.state_dict())
    inputs = inputs_of(both, texts(), [0] * 6)
    preferences = torch.tensor([[1, -1], [1, 1], [-1, 0]], dtype=torch.int8)
    only = preferences.clone()
    only[:, 1] = 0
    for model, wanted in ((both, preferences), (alone, only)):
        model.apply_phase("capability")
        model.phase_loss("capability", inputs, wanted)[0].backward()
    for ours, theirs in zip(*(m.inner[0].experts.parameters() for m in (both, alone)), strict=True):
        torch.testing.assert_close(ours.grad[0], theirs.grad[0])
        assert not theirs.grad[1].any()


def test_inner_models_may_share_their_experts(bases, tmp_path):
    model, apart = (dmoerm(bases["bert"], share_capabilities=shared) for shared in (True, False))
    first, second = model.inner
    assert first.experts is second.experts and first.task is not second.task and first.combine is not second.combine
    one = sum(p.numel() for p in first.experts.parameters())
    assert count_trained(apart) - count_trained(model) == one
    inputs = inputs_of(model, texts(), ROUTES)
    preferences = torch.tensor([[1, -1], [1, 1], [-1, 0]], dtype=torch.int8)
    stir(model)
    model.begin("capability")
    mean = torch.stack([first.task.head[0], second.task.head[0]]).mean(0)
    assert all(torch.equal(head, mean) for head in first.experts.head)
    before = first.capability_scores(inputs.streams).detach()
    step(model, "capability", inputs_of(model, texts(), [1] * 6), preferences)
    # What the second inner model's pairs teach, the first knows too, on top of a task model of its own.
    after = first.capability_scores(inputs.streams).detach()
    assert not torch.allclose(before, after, atol=1e-3)
    assert not torch.allclose(after, second.capability_scores(inputs.streams), atol=1e-3)
    loaded = zoo.load(zoo.save(model.eval(), tmp_path / "saved", card=CARD))
    torch.testing.assert_close(loaded.read(inputs).reward, model.read(inputs).reward)
    assert loaded.inner[0].experts is loaded.inner[1].experts
    for names in ({"ground": ["length"], "kitchen": ["refusal"]}, None):
        with pytest.raises(ValueError, match="share_capabilities=True: takes capabilities, the same for all"):
            DMoERM(GROUPS, names, bases["bert"], share_capabilities=True)


def test_scores_are_combined_in_units_of_what_they_differ_by(bases):
    model = stir(DMoERM(GROUPS, ["length", "refusal"], bases["bert"], aggregate="score", aggregate_dim=0))
    inner, inputs = model.inner[0], inputs_of(model, texts(), [0] * 6)
    preferences = torch.ones(3, 2, dtype=torch.int8)
    scores = inner.capability_scores(inputs.streams).detach()
    expected = (scores[:3] - scores[3:]).square().mean(0)
    for _ in range(3):
        model.phase_loss("capability", inputs, preferences)
        torch.testing.assert_close(inner.units.square, expected)
    inner.units.follow(torch.full((2, 2), 5.0))
    # Of four batches it is the mean.
    torch.testing.assert_close(inner.units.square, 0.75 * expected + 0.25 * 25)
    for _ in range(96):
        inner.units.follow(torch.zeros(2, 2))
    before = inner.units.square.clone()
    inner.units.follow(torch.zeros(2, 2))
    torch.testing.assert_close(inner.units.square, 0.98 * before)
    inner.units.square.copy_(expected)
    assert torch.equal(model.inner[1].units.square, torch.ones(2)), "it has no pair here"
    inner.units.square[1] = 0.0
    with torch.no_grad():
        model.phase_loss("capability", inputs, preferences)
        assert float(inner.units.square[1]) == 0, "of pairs that are not learned from nothing is kept"
        model.begin("aggregate")
        inner.combine.weight.copy_(torch.tensor([[1.0, 0.0]]))
        rewards = inner(inputs.streams)[:, 0]
    assert (rewards[:3] - rewards[3:]).square().mean() == pytest.approx(1, rel=1e-2)
    assert inner.units.value[1] > 0, "a score that is always the same can be combined"


def test_a_linear_aggregation_may_be_held_to_its_start(bases):
    names = ["length", "preference"]
    free, held = (
        stir(DMoERM(GROUPS, names, bases["bert"], aggregate="score", aggregate_dim=0, aggregate_decay=decay))
        for decay in (0.0, 0.3)
    )
    for inner in (*free.inner, *held.inner):
        torch.nn.init.zeros_(inner.weights)
    inputs, preferences = inputs_of(free, texts(), [1] * 6), torch.zeros(3, 2, dtype=torch.int8)
    for model in (free, held):
        model.inner[1].units.square.copy_(torch.tensor([4.0, 9.0]))
        model.begin("aggregate")
        assert model.inner[1].combine.weight.tolist() == [[0, 3]] and model.inner[1].distance() == 0
        with torch.no_grad():
            model.inner[1].combine.weight += torch.tensor([[2.0, -1.0]])
            # No text is of this group.
            model.inner[0].combine.weight += 5
        model.apply_phase("aggregate")
    losses = [model.phase_loss("aggregate", inputs, preferences)[0] for model in (free, held)]
    assert (losses[1] - losses[0]).item() == pytest.approx(0.3 * 4), "the preference may be as loud as it likes"
    assert held.phase_loss("task", inputs, preferences)[0] == free.phase_loss("task", inputs, preferences)[0]
    scores = {"aggregate": "score", "aggregate_dim": 0, "aggregate_decay": 0.3}
    mean = stir(DMoERM(GROUPS, ["length", "refusal"], bases["bert"], **scores)).inner[0]
    mean.begin()
    with torch.no_grad():
        mean.combine.weight += 1
    assert mean.distance().item() == pytest.approx(2, rel=1e-4), "without one all are held"
    for wrong in ({"aggregate_dim": 8}, {"aggregate": "hidden"}, {"aggregate_start": "random"}):
        with pytest.raises(ValueError, match=r"aggregate_decay=0\.3: is for a linear map"):
            DMoERM(GROUPS, names, bases["bert"], **{**scores, **wrong})
    with pytest.raises(ValueError, match=r"aggregate_decay=0\.3: is for a linear map"):
        DMoERM(GROUPS, base=bases["bert"], aggregate_dim=0, aggregate_decay=0.3)
    with pytest.raises(ValueError, match=r"aggregate_decay=-1: must not be negative"):
        DMoERM(GROUPS, names, bases["bert"], aggregate_dim=0, aggregate_decay=-1)


def test_weights_of_capabilities_are_learned_without_the_preferences_word(bases):
    model = stir(dmoerm_of(bases["bert"], "score", True, ["length", "preference", "refusal"]))
    inputs = inputs_of(model, texts(), [0, 1, 1, 0, 1, 1])
    units = torch.tensor([2.0, 3.0, 0.5])
    for inner in model.inner:
        inner.units.square.copy_(units**2)
    model.begin("weigh")
    model.apply_phase("weigh")
    loss, right = model.phase_loss("weigh", inputs, torch.zeros(3, 2, dtype=torch.int8))
    margins = []
    for row, number in enumerate([0, 1, 1]):
        inner = model.inner[number]
        scores = inner.capability_scores(inputs.streams).detach()
        difference = (scores[row] - scores[row + 3]) / units
        margins.append(inner.weights[0] * difference[0] + inner.weights[2] * difference[2])
    expected = sum(torch.log1p(torch.exp(-margin)) for margin in margins) / 3
    torch.testing.assert_close(loss, expected)
    assert right.tolist() == [bool(margin > 0) for margin in margins]
    loss.backward()
    for inner in model.inner:
        assert inner.weights.grad[0] != 0 and inner.weights.grad[1] == 0
    model.begin("aggregate")
    with torch.no_grad():
        reading = model.read(inputs, oracle=True)
        rows = zip(reading.scores, inputs.groups.tolist(), strict=True)
        others = torch.stack([(model.inner[number].weights * of / units)[[0, 2]].sum() for of, number in rows])
        torch.testing.assert_close(reading.reward, (reading.scores[:, 1] + others) / 2, atol=1e-5, rtol=1e-4)
    assert all(inner.distance() == 0 for inner in model.inner)
    assert not dmoerm_of(bases["bert"], "score", False).phase_parameters("weigh")
    with pytest.raises(ValueError, match="no linear map"):
        dmoerm_of(bases["bert"], "score", False).inner[0].weighed(torch.zeros(1, 2))


@pytest.mark.parametrize("members", [1, 3])
def test_a_general_expert_is_added_to_all_inner_models_and_learns_from_all_groups(bases, members):
    names = ["length", "preference"]
    general = {"general_rank": 4, "general_members": members}
    model = stir(dmoerm_of(bases["bert"], "score", True, names, **general)).eval()
    found = texts()
    inputs = inputs_of(model, found, ROUTES)
    with torch.no_grad():
        model.general_scale.fill_(0.7)
        reading = model.read(inputs, oracle=True)
        states = [peft_state(bases["bert"], found, [matrices(model, model.general, one)]) for one in range(members)]
        reads = [torch.cat([state, inputs.means], dim=1) for state in states]
        alone = torch.stack([read @ head for read, head in zip(reads, model.general.head, strict=True)], dim=1)
        torch.testing.assert_close(reading.scores[:, 2], alone.mean(1), atol=1e-5, rtol=1e-4)
        for number, inner in enumerate(model.inner):
            own = torch.tensor(ROUTES) == number
            torch.testing.assert_close(reading.scores[own, :2], inner.capability_scores(inputs.streams)[own])
            rewards = (inner.combine.weight[0] * reading.scores[own, :2] / inner.units.value).sum(1)
            expected = rewards + 0.7 * alone[own].mean(1)
            torch.testing.assert_close(reading.reward[own], expected, atol=1e-5, rtol=1e-4)
    assert model.score_names(0) == ["length", "preference", "general"]
    assert {id(p) for p in model.phase_parameters("joint")} == {id(p) for p in model.general.parameters()}
    preferences = torch.ones(3, 2, dtype=torch.int8)
    loss, right = model.phase_loss("joint", inputs, preferences)
    losses = torch.log1p(torch.exp(alone[3:] - alone[:3])).mean(0)
    torch.testing.assert_close(loss, losses.sum(), atol=1e-5, rtol=1e-4)
    assert right.tolist() == (alone[:3].mean(1) > alone[3:].mean(1)).tolist()
    # Of no phase but its own it learns; how sure it may be, the aggregation finds.
    before = [parameter.detach().clone() for parameter in model.general.parameters()]
    for phase in ("task", "capability", "weigh"):
        step(model, phase, inputs, preferences)
    assert model.general_scale.item() == pytest.approx(0.7)
    step(model, "aggregate", inputs, preferences)
    assert model.general_scale.item() != pytest.approx(0.7)
    assert all(torch.equal(*both) for both in zip(before, model.general.parameters(), strict=True))
    for wrong in ({"capabilities": []}, {"capabilities": ["general"]}, {"general_rank": -1}):
        arguments = {"capabilities": names, "general_rank": 4, **wrong}
        with pytest.raises(ValueError, match=r"general_rank=.*takes capabilities, of which none is called 'general'"):
            DMoERM(GROUPS, base=bases["bert"], **arguments)
    with pytest.raises(ValueError, match=r"general_members=2: takes general_rank, which is 0"):
        dmoerm_of(bases["bert"], "score", True, names, general_members=2)
    with pytest.raises(ValueError, match=r"general_members=0: must be at least 1"):
        dmoerm_of(bases["bert"], "score", True, names, general_rank=4, general_members=0)


@pytest.mark.parametrize("aggregate", ["hidden", "score"])
def test_aggregation_and_the_general_experts_scale_learn_apart(bases, aggregate):
    model = stir(dmoerm_of(bases["bert"], aggregate, False, ["length", "preference"], general_rank=4)).eval()
    inputs = inputs_of(model, texts(), [0, 1, 1, 0, 1, 1])
    preferences = torch.zeros(3, 2, dtype=torch.int8)
    with torch.no_grad():
        reading = model.read(inputs, oracle=True)
    general = model.general_scale.item() * reading.scores[:, 2]
    both = torch.stack([reading.reward - general, general])
    expected = torch.log1p(torch.exp(both[:, 3:] - both[:, :3])).mean(1).sum()
    loss, right = model.phase_loss("aggregate", inputs, preferences)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-4)
    assert right.tolist() == (reading.reward[:3] > reading.reward[3:]).tolist()


def test_members_of_a_general_expert_start_apart_and_learn_alone(bases):
    model, alone = (
        dmoerm_of(bases["bert"], "score", True, ["preference"], general_rank=4, general_members=count)
        for count in (2, 1)
    )
    first, second = model.general.head
    assert not torch.equal(first, second) and first.norm().item() == pytest.approx(1, rel=0.3)
    inputs = inputs_of(model, texts(), [0] * 6)
    pairs = list(zip(alone.general.parameters(), model.general.parameters(), strict=True))
    with torch.no_grad():
        for own, both in pairs:
            own.copy_(both[:1])
    for one in (model, alone):
        one.phase_loss("joint", inputs, torch.ones(3, 1, dtype=torch.int8))[0].backward()
    for own, both in pairs:
        torch.testing.assert_close(own.grad[0], both.grad[0], atol=1e-6, rtol=1e-4)


def test_phases_without_effect_are_refused(bases):
    names, last = ["length", "preference"], ["task", "capability", "weigh", "aggregate"]
    plain, general = (dmoerm_of(bases["bert"], "score", True, names, general_rank=rank) for rank in (0, 4))
    for model, plan, pretrained in (
        (plain, ["router", "joint", *last], None),
        (plain, ["router", "task", "capability", "aggregate"], None),
        (plain, ["aggregate"], "one"),
        (general, ["router", "joint", *last], None),
        (general, ["joint", "task"], "one"),
    ):
        model.check_plan(plan, pretrained)
    with pytest.raises(ValueError, match="'joint': it makes what a later phase starts from, and that of one has gone"):
        plain.check_plan(["joint"], "one")
    for model in (plain, general):
        with pytest.raises(ValueError, match="'weigh': it makes what a later phase starts from"):
            model.check_plan(["weigh", "aggregate"], "one")
        with pytest.raises(ValueError, match=r"'weigh' need 'aggregate'.* found phases joint, weigh and"):
            model.check_plan(["joint", "weigh", "weigh"], None)
    with pytest.raises(ValueError, match="aggregate_start='random'"):
        dmoerm_of(bases["bert"], "score", True, names, aggregate_start="random").check_plan(last, None)


def test_no_part_of_a_new_model_is_heard_as_it_was_drawn(bases):
    names, base = ["length", "preference"], bases["bert"]
    one = {"all": []}
    alone, mixture = DMoERM(one, base=base), DMoERM(one, names, base)
    several, general = (dmoerm_of(base, "score", True, names, general_rank=rank) for rank in (0, 4))
    gated = ObjectiveModel(["length"], gate=True, base=base)
    for model, plan in (
        (alone, ["joint"]),
        (alone, ["task"]),
        (mixture, ["joint", "capability", "aggregate"]),
        (mixture, ["task", "capability", "aggregate"]),
        (DMoERM(GROUPS, base=base), ["router", "task"]),
        (gated, ["objectives"]),
    ):
        model.check_plan(plan, None)
    for model, plan, missing in (
        (mixture, ["joint", "task"], "capability, aggregate"),
        (mixture, ["capability", "aggregate"], "task"),
        (several, ["joint"], "router, task, capability, aggregate"),
        (DMoERM(GROUPS, base=base), ["router", "joint"], "task"),
        (DMoERM(GROUPS, base=base), ["task"], "router"),
        (general, ["router", "task", "capability", "weigh", "aggregate"], "joint"),
        (gated, ["gate"], "objectives"),
    ):
        with pytest.raises(ValueError, match=f"epochs without {missing}: what they train would stay as it was drawn"):
            model.check_plan(plan, None)
        model.check_plan([phase for phase in plan if phase not in ("joint", "weigh")], "a checkpoint")
    assert not alone.phase_parameters("router"), "one group needs none"


def test_groups_may_have_capabilities_of_their_own(bases):
    names = {"kitchen": ["refusal", "length"], "ground": ["length", "formatting"]}
    model = stir(DMoERM(GROUPS, names, bases["bert"]))
    assert model.names == [names["ground"], names["kitchen"]]
    assert model.capability_names == ["length", "formatting", "refusal"]
    assert model.score_names(1) == names["kitchen"]
    inputs = inputs_of(model, texts(), [0, 1, 1, 0, 1, 1])
    # Of formatting the second group has no expert; of refusal the first.
    preferences = torch.tensor([[0, 1, 1], [1, 1, -1], [0, 0, 1]], dtype=torch.int8)
    loss, right = model.phase_loss("capability", inputs, preferences)
    expected, decisions = 0.0, 0
    for number, inner in enumerate(model.inner):
        rows = [row for row in range(3) if int(inputs.groups[row]) == number]
        scores = inner.capability_scores(inputs.streams)
        for place, name in enumerate(model.names[number]):
            column = model.capability_names.index(name)
            signs = [(row, int(preferences[row, column])) for row in rows if preferences[row, column]]
            terms = [torch.log1p(torch.exp(-s * (scores[r, place] - scores[r + 3, place]))) for r, s in signs]
            expected += sum(terms) / max(len(terms), 1)
            decisions += len(terms)
    torch.testing.assert_close(loss, torch.as_tensor(expected))
    assert len(right) == decisions
    with pytest.raises(UnknownNameError, match="kitchn"):
        DMoERM(GROUPS, {"kitchn": ["length"]}, bases["bert"])
    with pytest.raises(ValueError, match="same number"):
        DMoERM(GROUPS, {"kitchen": ["length"]}, bases["bert"])
    with pytest.raises(ValueError, match="in another group"):
        DMoERM({"a": ["x"], "b": ["x"]}, [], bases["bert"])
    with pytest.raises(UnknownNameError, match="aggregate"):
        dmoerm(bases["bert"], aggregate="sum")
    with pytest.raises(ValueError, match="layers=9"):
        dmoerm(bases["bert"], task_layers=9)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("aggregate", ["hidden", "score"])
def test_aggregation_starts_from_the_expert_of_the_preference_or_from_the_mean(bases, aggregate, linear):
    found = {}
    for names in (["length", "preference"], ["length", "no_repetition"]):
        model = stir(dmoerm_of(bases["bert"], aggregate, linear, names)).eval()
        for inner in model.inner:
            if inner.weights is not None:
                # As without the phase that learns them.
                torch.nn.init.zeros_(inner.weights)
            inner.units.square.copy_(torch.tensor([4.0, 0.25]))
        model.begin("aggregate")
        inputs = inputs_of(model, texts(), ROUTES)
        with torch.no_grad():
            found[names[1]] = model.read(inputs, oracle=True)
    chosen, mean = found["preference"], found["no_repetition"]
    torch.testing.assert_close(chosen.reward, chosen.scores[:, 1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mean.reward, mean.scores.mean(1), atol=1e-4, rtol=1e-4)
    model = stir(dmoerm(bases["bert"], aggregate_start="random"))
    # Their units are 1 before and after.
    before = copy.deepcopy(model.state_dict())
    model.begin("aggregate")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(UnknownNameError, match="preference, random"):
        dmoerm(bases["bert"], aggregate_start="zero")
    with pytest.raises(ValueError, match="at least 2"):
        DMoERM(GROUPS, ["length"], bases["bert"], aggregate_dim=1)


def test_the_twin_is_one_lora_and_its_reward_the_task_models(bases):
    model = stir(DMoERM({"all": []}, base=bases["bert"])).eval()
    inputs = inputs_of(model, texts(), [0] * 6)
    with torch.no_grad():
        reading = model.read(inputs)
        torch.testing.assert_close(reading.reward, model.inner[0].task_rewards(inputs.streams))
    assert reading.scores.shape == (6, 0) and not model.phase_parameters("capability")


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_checkpoint_holds_what_was_trained_alone(bases, kind, tmp_path):
    model, found = stir(dmoerm(bases[kind])).eval(), texts()
    golden = [found[name] for name in ("input_ids", "mask", "type_ids", "prompt_ids", "prompt_mask")]
    hub.save(model, tmp_path / "checkpoint", card=CARD, golden_input=golden)
    hub.verify(tmp_path / "checkpoint")
    loaded = zoo.load(tmp_path / "checkpoint")
    assert not any(name.startswith("encoder.") for name in loaded.state_dict())
    counted = [
        value.numel()
        for name, value in loaded.state_dict().items()
        if not name.endswith((".square", ".batches", ".units.value"))
    ]
    assert sum(counted) == count_trained(model)
    with torch.no_grad():
        assert torch.equal(loaded(**found), model(**found))


def test_the_checkpoint_at_full_size_is_below_25_mb(tmp_path):
    """As configured, in half precision, on a base as wide as MiniLM; its feed-forward networks are half as wide."""
    network = yaml.safe_load(Path("configs/reward/dmoerm-minilm.yaml").read_text())["model"]["init_args"]["network"]
    base = save_base(tmp_path / "base", 384)
    assert 1.5e6 < 2 * count_trained(DMoERM(**network, base=base)) < 2.5e6
    own = {**network, "share_capabilities": False}
    assert 2 * count_trained(DMoERM(**own, base=base)) < 25e6, "nor would it be if all had experts of their own"


def test_heads_that_learn_what_people_prefer_are_held_to_zero(bases):
    """By the squared length of each; those of capabilities are free."""
    names, nothing = list(CAPABILITIES), torch.ones(3, 2, dtype=torch.int8)
    kinds = {
        "joint": lambda decay: DMoERM(GROUPS, names, bases["bert"], head_decay=decay),
        "members": lambda decay: LoraEnsemble(3, base=bases["bert"], head_decay=decay),
        "objectives": lambda decay: ObjectiveModel(names, base=bases["bert"], head_decay=decay),
    }
    for phase, make in kinds.items():
        free, held = (stir(make(decay)).eval() for decay in (0.0, 0.3))
        inputs = inputs_of(free, texts(), [0, 1, 1, 0, 1, 1])
        losses = {
            name: [model.phase_loss(name, inputs, nothing)[0].item() for model in (free, held)]
            for name in ([phase, "task", "capability"] if phase == "joint" else [phase])
        }
        if phase == "joint":
            first, second = (model.task.head.square().sum().item() for model in held.inner)
            # A batch of one group holds that group's; one of both the mean.
            expected = {"joint": 0.3 * first, "task": 0.3 * (first + second) / 2, "capability": 0.0}
        elif phase == "members":
            expected = {phase: 0.3 * held.experts.head.square().sum().item()}
        else:
            # What people prefer weighs half of it.
            expected = {phase: 0.15 * held.heads.weight[0].square().sum().item()}
        found = {name: after - before for name, (before, after) in losses.items()}
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-6), phase
    with pytest.raises(ValueError, match=r"head_decay=-0\.1: must not be negative"):
        LoraEnsemble(2, base=bases["bert"], head_decay=-0.1)


# --- baselines -------------------------------------------------------------------------------------------------------


def test_members_of_an_ensemble_are_separate_models(bases):
    model, found = stir(LoraEnsemble(3, base=bases["bert"], rank=2)).eval(), texts()
    inputs = inputs_of(model, found, [-1] * 6)
    reading = model.read(inputs)
    for number in range(3):
        state = peft_state(bases["bert"], found, [matrices(model, model.experts, number)])
        expected = torch.cat([state, inputs.means], dim=1) @ model.experts.head[number]
        torch.testing.assert_close(reading.scores[:, number], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(reading.reward, reading.scores.mean(1))
    assert torch.equal(reduce_members(reading.scores, "worst", 0.0), reading.scores.min(1).values)
    penalised = reading.scores.mean(1) - 0.7 * reading.scores.var(1, unbiased=False)
    torch.testing.assert_close(reduce_members(reading.scores, "uncertainty", 0.7), penalised)
    with torch.no_grad():
        model.phase_loss("members", inputs, torch.ones(3, 0, dtype=torch.int8))
    assert not model.centre.any(), "validation moves nothing"
    for _ in range(400):
        model.phase_loss("members", inputs, torch.ones(3, 0, dtype=torch.int8))
    centred = model.read(inputs).scores
    torch.testing.assert_close(centred.mean(0), torch.zeros(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(centred.diff(dim=0), reading.scores.diff(dim=0))
    with pytest.raises(UnknownNameError, match="reduction"):
        LoraEnsemble(2, "median", base=bases["bert"])


def test_a_gate_weighs_the_objectives_by_the_prompt(bases):
    fresh = ObjectiveModel(list(CAPABILITIES), gate=True, base=bases["bert"]).eval()
    start = torch.softmax(fresh.gating(inputs_of(fresh, texts(), [-1] * 6).prompts), 1)
    torch.testing.assert_close(start, torch.tensor([0.9, 0.05, 0.05]).expand(6, -1))
    model = stir(ObjectiveModel(list(CAPABILITIES), gate=True, base=bases["bert"])).eval()
    inputs = inputs_of(model, texts(), [-1] * 6)
    reading = model.read(inputs)
    weights = torch.softmax(model.gating(inputs.prompts), 1)
    torch.testing.assert_close(reading.reward, (weights * reading.scores).sum(1))
    # In their units, and held to its start.
    held = stir(ObjectiveModel(list(CAPABILITIES), gate=True, base=bases["bert"], gate_decay=0.5)).eval()
    nothing = torch.ones(3, 2, dtype=torch.int8)
    with torch.no_grad():
        last = held.gating[2].weight.square().sum()
        more = held.phase_loss("gate", inputs, nothing)[0] - model.phase_loss("gate", inputs, nothing)[0]
        torch.testing.assert_close(more, 0.5 * last)
        held.units.square.copy_(torch.tensor([1.0, 4.0, 0.25]))
        held.begin("gate")
        torch.testing.assert_close(
            held.read(inputs).reward, (weights * reading.scores * torch.tensor([1, 0.5, 2])).sum(1)
        )
    held.phase_loss("objectives", inputs, nothing)
    differences = (reading.scores[:3] - reading.scores[3:]).detach()
    torch.testing.assert_close(held.units.square, differences.square().mean(0))
    for wrong in ({"gate_decay": 0.5}, {"gate": True, "gate_decay": -1.0}):
        with pytest.raises(ValueError, match="is at least 0, and of a gate"):
            ObjectiveModel(list(CAPABILITIES), base=bases["bert"], **wrong)
    before = copy.deepcopy(model.state_dict())
    step(model, "gate", inputs, torch.ones(3, 2, dtype=torch.int8))
    moved = {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}
    assert moved and all(name.startswith("gating") for name in moved)
    plain = stir(ObjectiveModel(list(CAPABILITIES), base=bases["bert"])).eval()
    reading = plain.read(inputs_of(plain, texts(), [-1] * 6))
    assert torch.equal(reading.reward, reading.scores[:, 0]) and plain.phases == ("objectives",)


def test_an_inner_model_without_experts_says_so(bases):
    model = DMoERM({"all": []}, base=bases["bert"])
    inputs = inputs_of(model, texts(), [0] * 6)
    with pytest.raises(ValueError, match="no capability experts"):
        InnerModel.states(model.inner[0], inputs.streams)
