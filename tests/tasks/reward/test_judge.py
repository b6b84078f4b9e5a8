"""A causal judge against the model's own probabilities, in both orders, and as a labeller."""

import json

import pytest
import torch

from tasks.reward.examples import Pair, generate_pairs
from tasks.reward.judge import CausalJudge
from tasks.reward.labelling import Ask, EndpointLabeller, in_words, label_pairs
from tests.tasks.reward.builders import save_causal
from zoo.base_models import load_causal
from zoo.errors import UnknownNameError

PAIR = Pair("user: how do i cook rice", "use butter", "use sugar and oil", "", "1")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a tiny causal model."""
    return save_causal(tmp_path_factory.mktemp("causal"))


@pytest.fixture(scope="module")
def judge(base):
    return CausalJudge(base)


def test_odds_are_those_of_the_two_letters(judge, base):
    ask = Ask(PAIR.prompt, PAIR.chosen, PAIR.rejected, "clarity")
    text = "\n\n".join(message["content"] for message in in_words(ask, judge.what("clarity"))) + "\nAnswer:"
    ids = judge.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        probabilities = torch.softmax(load_causal(base)(input_ids=ids).logits[0, -1], 0)
    first, second = (probabilities[judge.tokenizer.convert_tokens_to_ids(letter)] for letter in "ab")
    assert judge.log_odds(ask) == pytest.approx(float(torch.log(first / second)), abs=1e-4)


def test_a_chat_template_is_used(base):
    chatty = CausalJudge(base)
    chatty.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} </s> {% endfor %}so"
    messages = in_words(Ask("a", "b", "c", "depth"), "goes further")
    words = chatty.tokenizer.decode(chatty.tokens(messages))
    assert words.count("</s>") == 2 and words.endswith("so")


def test_both_orders_are_free_of_what_the_judge_thinks_of_places(judge):
    first, second = judge.both_orders(PAIR)
    swapped = judge.both_orders(Pair(PAIR.prompt, PAIR.rejected, PAIR.chosen, "", "1"))
    assert swapped == pytest.approx((-second, -first))


def test_long_texts_are_cut(base):
    judge = CausalJudge(base, max_prompt=5, max_answer=3)
    assert judge.log_odds(Ask("long " * 99 + "rice", "use" * 50, "and" * 50, "depth")) == judge.log_odds(
        Ask(" rice", "use", "and", "depth")
    )


def test_it_labels_capabilities_as_an_endpoint_does(judge):
    labels = label_pairs(generate_pairs(6), ["clarity", "depth"], judge, progress=False)
    assert labels.preferences.shape == (6, 2) and not any(labels.malformed.values())
    body = EndpointLabeller("http://localhost:1/v1", "m").body("p", " x", "y ", "clarity")
    assert body["messages"] == in_words(Ask("p", "x", "y", "clarity"), judge.what("clarity"))
    assert json.loads(judge.identity("clarity")) != json.loads(judge.identity("depth"))


def test_what_cannot_judge_is_refused(judge, monkeypatch):
    with pytest.raises(UnknownNameError, match="clarity"):
        judge("p", "x", "y", "claritty")
    assert CausalJudge(judge.base, descriptions={"tone": "is friendlier"}).what("tone") == "is friendlier"
    # Of these two letters the tokenizer knows neither.
    monkeypatch.setattr("tasks.reward.judge.LETTERS", ("Y", "Z"))
    with pytest.raises(ValueError, match="does not tell Y from Z"):
        CausalJudge(judge.base)
