"""The network against transformers by hand, options against a loop one by one, what is saved and what is trained."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from toys import CARD
from transformers import AutoModel, AutoModelForCausalLM

import zoo
from tasks.multitask.encode import Form, TaskDataset
from tasks.multitask.examples import Example, generate_examples
from tasks.multitask.model import MultitaskModel, module_name
from tests.tasks.multitask.builders import LAYERS, LENGTH
from zoo.base_models import load_tokenizer
from zoo.errors import CheckpointError
from zoo.moe import collect_aux_losses, record_usage, routed_modules

TASKS = {"topic": ["animal", "food", "tool"], "mood": ["negative", "positive"], "which": []}
ADAPTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "lora": {"r": 4},
    "smora": {"r": 8, "top_k": 2},
    "mola": {"r": 2, "experts": [2, 3]},
}


def build(base: str, method: str = "smora", **arguments: Any) -> MultitaskModel:
    torch.manual_seed(0)
    arguments = {"tasks": dict(TASKS), "adapter": ADAPTERS[method] or None, **arguments}
    return MultitaskModel(base, method=method, **arguments).eval()


def scrambled(model: MultitaskModel) -> MultitaskModel:
    """With all that is trained changed, so that adapters, routers and heads matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def dataset(model: MultitaskModel, count: int = 3, learning: bool = False, tasks: Any = None) -> TaskDataset:
    examples = generate_examples(tasks or list(model.tasks), count)
    return TaskDataset(examples, load_tokenizer(model.base), model.form, LENGTH, learning)


def scores(model: MultitaskModel, of: TaskDataset, places: Any = None) -> torch.Tensor:
    with torch.no_grad():
        return model(*of.collate(range(len(of)) if places is None else places, 0).inputs)


# --- encoders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ADAPTERS)
@pytest.mark.parametrize(("head", "pooling"), [("task", "mean"), ("shared", "first"), ("verbalised", "mean")])
def test_a_new_network_is_its_base_with_heads(encoder, method, head, pooling):
    model = build(encoder, method, head=head, pooling=pooling)
    of = dataset(model)
    found = scores(model, of)
    base = AutoModel.from_pretrained(encoder, add_pooling_layer=False).eval()
    keys = {"task": list(TASKS), "shared": [0, 1, 2], "verbalised": [0, 0, 0]}[head]
    for place, example in enumerate(of.examples):
        expected = []
        for row in of.encoded[place].rows:
            with torch.no_grad():
                hidden = base(torch.tensor([row.ids]), token_type_ids=torch.tensor([row.types])).last_hidden_state[0]
            pooled = hidden.mean(0) if pooling == "mean" else hidden[0]
            key = keys[list(TASKS).index(example.task)]
            expected.append(model.heads[list(dict.fromkeys(keys)).index(key)](pooled))
        expected = torch.cat(expected)
        assert torch.allclose(found[place, : len(expected)], expected, atol=1e-5)
        assert (found[place, len(expected) :] == float("-inf")).all()
        assert len(expected) == len(of.options[place])


@pytest.mark.parametrize("method", ["smora", "mola"])
def test_scores_depend_neither_on_the_batch_nor_on_padding(encoder, causal, method):
    for base in (encoder, causal):
        model = scrambled(build(base, method, causal=base == causal))
        of = dataset(model)
        together = scores(model, of)
        for place in range(len(of)):
            alone = scores(model, of, [place])[0]
            assert torch.allclose(alone, together[place, : len(alone)], atol=1e-4)


def test_heads_are_shared_as_asked(encoder):
    tasks = {"a": ["x", "y"], "b": ["x", "y"], "c": ["x", "z"], "d": [], "e": []}
    outputs = {"task": [2, 2, 2, 1, 1], "shared": [2, 2, 1], "verbalised": [1]}
    for head, sizes in outputs.items():
        model = build(encoder, "none", head=head, tasks=tasks)
        assert [of.out_features for of in model.heads] == sizes
        if head == "shared":
            assert model.head_of(0) is model.head_of(1) is not model.head_of(2)
            assert model.head_of(3) is model.head_of(4)


def test_new_tasks_get_heads_and_known_ones_keep_theirs(encoder):
    model = scrambled(build(encoder))
    before = scores(model, dataset(model))
    model.add_tasks({"mood": TASKS["mood"], "own": ["a", "b", "c", "d"]})
    assert list(model.tasks) == [*TASKS, "own"] and len(model.heads) == 4 and model.head_of(3).out_features == 4
    assert torch.equal(scores(model, dataset(model, tasks=list(TASKS))), before)
    assert all(parameter.requires_grad for parameter in model.heads.parameters())
    with pytest.raises(ValueError, match=r"knows the task 'mood' with \['negative', 'positive'\], the data have \['a'"):
        model.add_tasks({"mood": ["a", "b"]})
    with pytest.raises(ValueError, match="takes a causal base"):
        model.add_tasks({"say": None})


def test_the_base_is_frozen_and_everything_else_is_trained(encoder):
    for method, adapter in ADAPTERS.items():
        model = build(encoder, method).train()
        batch = dataset(model).collate(range(9), 0)
        loss = nn.functional.cross_entropy(model(*batch.inputs), batch.labels)
        (loss + collect_aux_losses(model).total).backward()
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained == {n for n, _ in model.named_parameters() if "lora_" in n or "router" in n or "heads" in n}
        assert bool(adapter) == any("lora_" in name for name in trained)
        # Every B learns from the first step on; A and routers follow.
        assert all(model.get_parameter(n).grad.any() for n in trained if "lora_B" in n or n.startswith("heads"))
    model = build(encoder, freeze="nothing")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_heads_answer_in_mixed_precision(encoder):
    model = build(encoder)
    of = dataset(model)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = scores(model, of)
    finite = mixed.isfinite()
    torch.testing.assert_close(mixed[finite].float(), scores(model, of)[finite], atol=0.1, rtol=0.1)


@pytest.mark.parametrize("method", ["lora", "smora", "mola"])
@pytest.mark.parametrize("kind", ["encoder", "causal"])
def test_a_frozen_base_in_bfloat16(request, tmp_path, kind, method):
    base = request.getfixturevalue(kind)
    # All experts: choices may turn on the last digit.
    adapter = {"lora": {"r": 4}, "smora": {"r": 8, "top_k": 8}, "mola": {"r": 2, "experts": 3, "top_k": 3}}[method]
    arguments = {"causal": kind == "causal", "tasks": {"mood": TASKS["mood"]}, "adapter": adapter}
    narrow = scrambled(build(base, method, base_dtype="bfloat16", **arguments))
    assert {narrow.get_parameter(name).dtype for name in narrow.base_tensors} == {torch.bfloat16}
    others = {name: of.dtype for name, of in narrow.named_parameters() if name not in narrow.base_tensors}
    assert others and set(others.values()) == {torch.float32}
    full = build(base, method, **arguments)
    full.load_state_dict(narrow.state_dict())
    of = dataset(narrow)
    found, expected = scores(narrow, of), scores(full, of)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0.1)
    assert not torch.equal(found, expected)
    zoo.save(narrow, tmp_path / "saved", card=CARD)
    assert torch.equal(scores(zoo.load(tmp_path / "saved"), of), found)


def test_processes_may_have_read_no_example_of_a_task(encoder, tmp_path):
    model = build(encoder).train()
    of = dataset(model)
    expected = model(*of.collate([0], 0).inputs)
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/meeting", world_size=1, rank=0)
    try:
        shared = nn.parallel.DistributedDataParallel(model)
        for place in (0, 3):
            batch = of.collate([place], 0)
            out = shared(*batch.inputs)
            assert place or torch.equal(out, expected)
            nn.functional.cross_entropy(out, batch.labels).backward()
        assert all(parameter.grad is not None for parameter in model.heads.parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_all_linear_layers_are_adapted_unless_said_otherwise(encoder):
    assert len(routed_modules(build(encoder))) == 6 * LAYERS
    few = build(encoder, adapter={"r": 8, "top_k": 2, "target_modules": ["query"]})
    names = [module_name(name) for name in routed_modules(few)]
    assert names == [f"layer {layer} attention.self.query" for layer in range(LAYERS)]
    assert module_name("transformer.pooler.mola_experts.default") == "transformer.pooler"


def test_padding_is_neither_routed_nor_counted(encoder, causal):
    for base in (encoder, causal):
        model = scrambled(build(base, causal=base == causal))
        batch = dataset(model).collate(range(9), 0)
        assert not batch.attention_mask.all()
        with record_usage(model) as usages, model.watched() as routing:
            model(*batch.inputs)
        assert {usage.units for usage in usages.values()} == {float(batch.attention_mask.sum())}
        assert len(routing) == len(usages)
        assert all(found.sample_index.max() == len(batch.input_ids) - 1 for found in routing.values())
        assert not any(module._observers for module in routed_modules(model).values())
    with build(encoder, "lora").watched() as routing:
        assert not routing


# --- causal bases ----------------------------------------------------------------------------------------------------


def naive(base: Any, tokenizer: Any, text: str, option: str) -> float:
    """Mean log-likelihood of an option's tokens, token by token."""
    ids = tokenizer(text)["input_ids"]
    total, answer = 0.0, tokenizer(option)["input_ids"]
    for token in answer:
        with torch.no_grad():
            total += float(base(torch.tensor([ids])).logits[0, -1].log_softmax(0)[token])
        ids = [*ids, token]
    return total / len(answer)


@pytest.mark.parametrize("method", ["lora", "smora", "mola"])
def test_options_are_scored_as_one_by_one(causal, method):
    tasks = {"mood": ["not_positive_at_all", "great"], "which": [], "colour": None}
    model = scrambled(build(causal, method, causal=True, tasks=tasks))
    plain = AutoModelForCausalLM.from_pretrained(causal).eval()
    tokenizer = load_tokenizer(causal)
    examples = [
        Example("0", "mood", "the film was great", "the book", "great"),
        *generate_examples(["which"], 3),
        Example("1", "mood", "the film"),
    ]
    of = TaskDataset(examples, tokenizer, model.form, LENGTH)
    found = scores(model, of)
    for place, example in enumerate(examples):
        text = example.text + ("\n" + example.text2 if example.text2 else "")
        options = [option.replace("_", " ") for option in of.options[place]]
        text += f"\nOptions: {'; '.join(options)}\nAnswer:"
        for place_of_option, option in enumerate(options):
            # The adapters are in the base that the network holds.
            by_hand = naive(model.transformer, tokenizer, text, option)
            assert found[place, place_of_option] == pytest.approx(by_hand, abs=1e-4)
            assert by_hand != pytest.approx(naive(plain, tokenizer, text, option), abs=1e-3)


def test_the_loss_is_that_of_the_answer_s_tokens_alone(causal):
    model = scrambled(build(causal, causal=True, tasks={"mood": TASKS["mood"], "colour": None}))
    of = dataset(model, learning=True)
    found = scores(model, of)
    assert found.shape == (6, 1)
    for place in range(len(of)):
        (row,) = of.encoded[place].rows
        ids = torch.tensor([row.ids])
        labels = ids.clone()
        labels[:, : -row.scored] = -100
        with torch.no_grad():
            assert -found[place, 0] == pytest.approx(float(model.transformer(ids, labels=labels).loss), abs=1e-5)


def test_a_causal_network_generates(causal):
    model = scrambled(build(causal, causal=True, tasks={"colour": None}))
    # As the bases of chat models bring it.
    model.transformer.generation_config.repetition_penalty = 50.0
    ids = [[5, 9, 7], [6, 8]]
    padded = torch.tensor([[5, 9, 7], [0, 6, 8]])
    together = model.generate(padded, padded > 0, 4, 0)
    for row, own in zip(together, ids, strict=True):
        text = list(own)
        for token in row.tolist():
            with torch.no_grad():
                assert token == int(model.transformer(torch.tensor([text])).logits[0, -1].argmax())
            if token == 3:
                break
            text.append(token)


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "method"), [("encoder", "smora"), ("encoder", "lora"), ("causal", "mola")])
def test_a_checkpoint_holds_adapters_and_heads_alone(request, tmp_path, kind, method):
    base = request.getfixturevalue(kind)
    model = scrambled(build(base, method, causal=kind == "causal"))
    if method == "smora":
        for module in routed_modules(model).values():
            module.biased_router.expert_bias.normal_()
    golden = dataset(model).collate(range(4), 0).inputs
    folder = zoo.save(model, tmp_path / "saved", card=CARD, golden_input=golden)
    zoo.verify(folder)
    state = load_file(folder / "model.safetensors")
    assert all("lora_" in name or "router" in name or name.startswith("heads") for name in state)
    assert sum(tensor.numel() for tensor in state.values()) < sum(p.numel() for p in model.parameters()) / 2
    loaded = zoo.load(folder)
    assert torch.equal(scores(loaded, dataset(loaded)), scores(model, dataset(model)))
    assert (loaded.tasks, loaded.method, loaded.adapter) == (model.tasks, method, ADAPTERS[method])
    assert zoo.info(folder).init_args["base_sha256"] == model.base_sha256
    with pytest.raises(CheckpointError, match="has other weights"):
        MultitaskModel(base, base_sha256="0" * 64, causal=kind == "causal")


# --- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "adalora"}, "Unknown method 'adalora'"),
        ({"head": "tasks"}, "Unknown head 'tasks'. Did you mean 'task'"),
        ({"pooling": "max"}, "Unknown pooling 'max'"),
        ({"freeze": "all"}, "Unknown freezing 'all'"),
        ({"base_dtype": "float16"}, "Unknown dtype of the base 'float16'"),
        ({"base_dtype": "bfloat16", "freeze": "nothing"}, "what is trained is float32; freeze the base"),
        ({"method": "none", "adapter": {"r": 2}}, "has no effect on method='none'"),
        ({"adapter": {"rank": 2}}, "Unknown argument of SmoraConfig 'rank'"),
        ({"adapter": {"r": 8, "top_k": 9}}, "top_k"),
        ({"method": "mola", "adapter": {"experts": [2, 3, 4]}}, "3"),
        ({"adapter": {"target_modules": ["nothing"]}}, "nothing"),
        ({"causal": True, "method": "none"}, "nothing would be trained"),
        ({"causal": True, "freeze": "embeddings"}, "is for encoders"),
        ({"causal": True, "head": "shared"}, "a causal model has no heads"),
    ],
)
def test_arguments_that_do_not_fit(encoder, causal, arguments, words):
    with pytest.raises(ValueError, match=words):
        MultitaskModel(causal if arguments.get("causal") else encoder, **arguments)


def test_rows_that_are_too_long(encoder):
    model = build(encoder, "none")
    form = Form(model.base, model.tasks)
    text = "the film was great " * 40
    of = TaskDataset([Example("0", "mood", text)], load_tokenizer(encoder), form, 2 * LENGTH)
    with pytest.raises(ValueError, match=rf"have 128 tokens; .* reads at most {LENGTH}"):
        scores(model, of)
