"""A policy's probabilities against the model's own, what teaching changes, and rewards against the model's forward."""

import json

import pytest
import torch

from tasks.reward.baselines import LoraEnsemble
from tasks.reward.examples import Candidate
from tasks.reward.model import DMoERM
from tasks.reward.policy import Answered, Policy, rate, without_lora
from tasks.reward.texts import ANSWER, encode_prompts, encode_texts, pad
from tests.tasks.reward.builders import GROUPS, save_base, save_causal, stir
from zoo.base_models import load_causal, load_tokenizer

PROMPT = "how do i cook rice"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a tiny causal model."""
    return save_causal(tmp_path_factory.mktemp("causal"))


def answered(policy, prompt, text):
    tokens = policy.tokenizer(text, add_special_tokens=False)["input_ids"]
    return Answered(prompt, text, [*tokens, policy.end])


def test_likelihoods_are_those_of_the_answers_tokens(base):
    policy = Policy(base)
    answers = [answered(policy, PROMPT, "use butter"), answered(policy, "what is the way", "take the train to elst")]
    with torch.no_grad():
        found = policy.log_likelihoods(answers)
        for value, one in zip(found, answers, strict=True):
            asked = policy.tokenizer(one.prompt + ANSWER, add_special_tokens=False)["input_ids"]
            ids = torch.tensor([asked + one.tokens])
            logits = torch.log_softmax(load_causal(base)(input_ids=ids).logits[0], -1)
            expected = sum(logits[len(asked) + place - 1, token] for place, token in enumerate(one.tokens))
            assert value.item() == pytest.approx(expected.item(), abs=1e-3)


def test_samples_follow_the_seed_and_the_policys_probabilities(base):
    policy = Policy(base)
    state = torch.random.get_rng_state()
    first, again, other = (policy.sample([PROMPT], 4, 6, seed)[0] for seed in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert first == again != other and len({one.answer for one in first}) > 1
    assert all(1 <= len(one.tokens) <= 6 for one in first)
    # The first token of many answers is as frequent as it is probable.
    # Also beside a longer prompt.
    drawn = policy.sample([PROMPT, f"{PROMPT} and butter"], 3000, 1)[0]
    assert {one.prompt for one in drawn} == {PROMPT}
    with torch.no_grad():
        likely = torch.softmax(policy.model(input_ids=torch.tensor([policy.ask(PROMPT)])).logits[0, -1], 0)
    token = int(likely.argmax())
    share = sum(one.tokens[0] == token for one in drawn) / len(drawn)
    assert share == pytest.approx(float(likely[token]), abs=4 * (float(likely[token]) / 3000) ** 0.5)


def test_an_answer_ends_where_it_says_so(base):
    policy = Policy(base)
    one = policy.answered("p", [7, policy.end, policy.end])
    assert one.tokens == [7, policy.end]


def test_nothing_but_the_policys_own_probabilities_is_drawn_from(base, tmp_path):
    plain, folder = Policy(base), tmp_path / "penalised"
    plain.model.save_pretrained(folder)
    plain.tokenizer.save_pretrained(folder)
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"repetition_penalty": 50.0, "eos_token_id": [plain.end, 7]}))
    penalised = Policy(str(folder))
    # Another token ends an answer too.
    assert penalised.ends == [plain.end, 7] and penalised.answered("p", [5, 7, 6]).tokens == [5, 7]
    ours, theirs = (policy.sample([PROMPT], 8, 6)[0] for policy in (plain, penalised))
    assert [penalised.answered(PROMPT, one.tokens).tokens for one in ours] == [one.tokens for one in theirs]


def test_teaching_makes_answers_likelier_and_leaves_the_base(base):
    policy = Policy(base)
    before = {name: value.clone() for name, value in policy.model.state_dict().items()}
    lesson = [answered(policy, PROMPT, "use butter and salt")] * 8
    (given,) = policy.sample([PROMPT], 8, 4)
    with torch.no_grad():
        start = policy.log_likelihoods(lesson[:1]).item()
        assert policy.kl(given) == 0
    policy.teach(lesson, epochs=6, lr=1e-2)
    with torch.no_grad():
        end = policy.log_likelihoods(lesson[:1]).item()
        with without_lora(policy.model):
            assert policy.log_likelihoods(lesson[:1]).item() == pytest.approx(start, abs=1e-5)
        assert policy.log_likelihoods(lesson[:1]).item() == end > start + 1
    for name, value in policy.model.state_dict().items():
        if "lora_" not in name:
            assert torch.equal(value, before[name.replace(".base_layer", "")]), name
    assert policy.kl(policy.sample([PROMPT], 32, 6)[0]) > 0
    # A second lesson goes on from the first.
    count = len(policy.model.state_dict())
    policy.teach(lesson[:1], epochs=1)
    assert len(policy.model.state_dict()) == count


def test_rates_are_the_models_rewards(tmp_path):
    base = save_base(tmp_path)
    tokenizer = load_tokenizer(base)
    models = [stir(DMoERM(GROUPS, ["length"], base, capability_layers=layers)).eval() for layers in (1, 2)]
    models += [stir(LoraEnsemble(2, base=base)).eval()]
    asked = [f"user: {PROMPT}", "user: what is the way"]
    candidates = [Candidate(prompt, text) for prompt in asked for text in ("use butter", "", "take the train")]
    found = rate(models, tokenizer, candidates, max_length=48, batch_size=4)
    for model, rewards in zip(models, found, strict=True):
        for one, reward in zip(candidates, rewards, strict=True):
            texts = pad(encode_texts([one.prompt], [one.answer], tokenizer, 48), 0)
            prompt = pad(encode_prompts([one.prompt], tokenizer, 48), 0)
            with torch.no_grad():
                assert float(model(*texts, *prompt[:2])) == pytest.approx(reward, abs=1e-4)
    assert rate(models[2:], tokenizer, candidates, max_length=48)[0] == pytest.approx(found[2], abs=1e-4)
