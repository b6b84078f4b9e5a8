"""The adapters as citizens of PEFT: the matrix that PEFT runs on its own methods, on four networks."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import nn

from tests.zoo.lora.networks import HEADS, MAKERS, make_base, make_config, make_inputs, old_name, output
from zoo.errors import CheckpointError
from zoo.lora import LoraMixture, MixtureLinear, MolaConfig, SmoraConfig
from zoo.moe import collect_aux_losses, record_trace, record_usage, update_selection_biases

pytestmark = old_name
METHODS = ("smora", "mola")
matrix = pytest.mark.parametrize(("method", "network"), [(method, network) for method in METHODS for network in MAKERS])
methods = pytest.mark.parametrize("method", METHODS)


def adapted(method: str, network: str, **options: object) -> PeftModel:
    return get_peft_model(make_base(network), make_config(method, network, **options)).eval()


def train_step(model: nn.Module, inputs: dict[str, torch.Tensor], lr: float = 0.1) -> None:
    """One step of every trainable parameter, and of the biases."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    (output(model, inputs).square().mean() + collect_aux_losses(model).total).backward()
    optimizer.step()
    optimizer.zero_grad()
    if any(module.biased_router is not None for module in model.modules() if isinstance(module, LoraMixture)):
        update_selection_biases(model, 0.05)
    model.eval()


@matrix
def test_only_adapters_and_heads_are_trained(method: str, network: str) -> None:
    model = adapted(method, network, modules_to_save=[HEADS[network]], exclude_modules=[HEADS[network]])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train_step(model, make_inputs(network))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    holder = f".{method}_experts.default."
    assert changed and all(holder in name or ".modules_to_save.default." in name for name in changed)
    parts = {name.split(holder)[1] for name in changed if holder in name}
    assert parts == {"lora_A", "lora_B", "router.weight"} | ({"router.expert_bias"} if method == "smora" else set())
    assert any(".modules_to_save." in name for name in changed)


@matrix
def test_saving_and_loading_gives_the_same_outputs(method: str, network: str, tmp_path: Path) -> None:
    """Under another name, with a trained router, its biases, and a head."""
    inputs = make_inputs(network)
    model = adapted(method, network, modules_to_save=[HEADS[network]], exclude_modules=[HEADS[network]])
    for _ in range(3):
        train_step(model, inputs)
    expected = output(model, inputs)
    model.save_pretrained(tmp_path)
    assert not torch.allclose(output(make_base(network), inputs), expected)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert not any("default" in name or "base_layer" in name for name in saved)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(
            make_base(network), tmp_path, adapter_name="other", low_cpu_mem_usage=low_cpu_mem_usage
        )
        assert torch.equal(output(loaded, inputs), expected)
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
    config = PeftConfig.from_pretrained(tmp_path)
    assert type(config) is type(model.peft_config["default"])
    assert config.peft_type == PeftType(method.upper()) == method.upper()


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("smora", {"score": "softmax", "block_size": 2}),
        ("smora", {"top_k": 8, "score": "none"}),
        ("mola", {"experts": 3, "top_k": 1}),
        ("mola", {"experts": 3, "top_k": None}),
        ("mola", {"experts": 3, "top_k": None, "shared_a": True}),
        ("mola", {"experts": 1, "top_k": 1}),
    ],
)
def test_every_setting_is_saved_and_loaded(method: str, options: dict, tmp_path: Path) -> None:
    inputs, model = make_inputs("llama"), adapted(method, "llama", **options)
    for _ in range(2):
        train_step(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base("llama"), tmp_path)
    assert torch.equal(output(loaded, inputs), output(model, inputs))
    assert loaded.peft_config["default"].to_dict() == PeftConfig.from_pretrained(tmp_path).to_dict()


@methods
def test_biases_are_saved_in_float32_and_kept(method: str, tmp_path: Path) -> None:
    model = adapted(method, "llama")
    for _ in range(3):
        train_step(model, make_inputs("llama"))
    model.save_pretrained(tmp_path)
    saved = {name: value for name, value in load_file(tmp_path / "adapter_model.safetensors").items() if "bias" in name}
    if method == "mola":
        assert not saved
        return
    assert len(saved) == 4 * 7
    assert all(value.dtype == torch.float32 and value.abs().sum() > 0 for value in saved.values())
    loaded = PeftModel.from_pretrained(make_base("llama").bfloat16(), tmp_path)
    for name, value in saved.items():
        holder = name.replace("smora_experts", "smora_experts.default")
        assert torch.equal(loaded.state_dict()[holder], value)


@pytest.mark.slow
def test_a_fresh_process_loads_both(tmp_path: Path) -> None:
    program = f"""
import torch
from peft import PeftModel
import zoo.lora
for method in ("smora", "mola"):
    base, x = torch.load(f"{tmp_path}/{{method}}.pt", weights_only=False)
    torch.save(PeftModel.from_pretrained(base, f"{tmp_path}/{{method}}")(x), f"{tmp_path}/{{method}}.out")
"""
    expected = {}
    for method in METHODS:
        base, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(5, 8)
        torch.save((base, x), tmp_path / f"{method}.pt")
        options = {"experts": 3} if method == "mola" else {}
        model = get_peft_model(base, make_config(method, "mlp", target_modules=["0", "2"], **options))
        model.save_pretrained(tmp_path / method)
        expected[method] = model(x)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, timeout=110)
    for method, out in expected.items():
        torch.testing.assert_close(torch.load(tmp_path / f"{method}.out"), out)


@matrix
def test_disabling_gives_the_base(method: str, network: str) -> None:
    model, inputs = adapted(method, network), make_inputs(network)
    with_adapter = output(model, inputs)
    expected = output(make_base(network), inputs)
    with model.disable_adapter(), record_usage(model) as usage:
        assert torch.equal(output(model, inputs), expected)
    assert not any(one.units for one in usage.values())
    assert not torch.allclose(with_adapter, expected)
    assert torch.equal(output(model, inputs), with_adapter)
    assert all(p.requires_grad for name, p in model.named_parameters() if f"{method}_experts" in name)
    assert torch.equal(output(model.unload(), inputs), expected)


@matrix
def test_several_adapters_live_side_by_side(method: str, network: str, tmp_path: Path) -> None:
    """Added, loaded, switched, used together and deleted; each is trained alone."""
    model, inputs = adapted(method, network), make_inputs(network)
    first = output(model, inputs)
    other = make_config(method, network, r=4) if method == "mola" else make_config(method, network, r=12, top_k=3)
    torch.manual_seed(1)
    model.add_adapter("second", other)
    assert torch.equal(output(model, inputs), first), "the new one is not active"
    model.set_adapter("second")
    second = output(model, inputs)
    assert not torch.allclose(first, second)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".second." in name for name in trained)
    with record_usage(model) as usage:
        output(model, inputs)
    assert {name.rpartition(".")[2] for name, one in usage.items() if one.units} == {"second"}

    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").is_file() and (tmp_path / "second/adapter_config.json").is_file()
    loaded = PeftModel.from_pretrained(make_base(network), tmp_path)
    loaded.load_adapter(tmp_path / "second", "loaded")
    assert torch.equal(output(loaded, inputs), first)
    loaded.set_adapter("loaded")
    assert torch.equal(output(loaded, inputs), second)

    model.set_adapter("default")
    assert torch.equal(output(model, inputs), first)
    model.delete_adapter("second")
    assert torch.equal(output(model, inputs), first)
    assert not any("second" in name for name, _ in model.named_parameters())
    with pytest.raises(ValueError, match="not found"):
        model.set_adapter("second")


@methods
def test_adapters_used_together_add_up(method: str) -> None:
    torch.manual_seed(0)
    config = make_config(method, "mlp", target_modules=["head"], **({"experts": 3} if method == "mola" else {}))
    model = get_peft_model(make_base("mlp"), config)
    model.add_adapter("second", copy.deepcopy(config))
    inputs = make_inputs("mlp")
    base = output(make_base("mlp"), inputs)
    alone = []
    for name in ("default", "second"):
        model.set_adapter(name)
        alone.append(output(model, inputs) - base)
    model.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(output(model, inputs), base + sum(alone))


@methods
def test_frozen_adapters_neither_count_nor_lose(method: str, tmp_path: Path) -> None:
    """One loaded for inference, in a model in training mode, is watched but not balanced."""
    adapted(method, "mlp", aux_losses={"z": 1.0}).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(make_base("mlp"), tmp_path).train()
    with record_usage(model) as usage:
        output(model, make_inputs("mlp"))
    assert all(one.units == 5 for one in usage.values())
    assert not collect_aux_losses(model).values
    routers = [module.biased_router for module in model.modules() if isinstance(module, LoraMixture)]
    assert all(router is None or router.window_counts.sum() == 0 for router in routers)


@methods
def test_trainable_parameters_are_counted(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"experts": 3} if method == "mola" else {}
    model = adapted(method, "mlp", **options)
    # Four layers of width 8: A and B of 8 (SMoRA) or 3 x 2 ranks, and a row of the router for each expert.
    expected = 4 * (2 * 8 * 8 + 8 * 8) if method == "smora" else 4 * (2 * 8 * 6 + 3 * 8)
    assert model.get_nb_trainable_parameters()[0] == expected
    model.print_trainable_parameters()
    assert f"trainable params: {expected}" in capsys.readouterr().out
    status = model.get_model_status()
    assert (status.adapter_model_type, status.enabled, status.num_adapter_layers) == (
        f"{type(model.base_model).__name__}",
        True,
        4,
    )


@methods
def test_layers_to_transform_chooses_layers(method: str) -> None:
    model = adapted(method, "bert", layers_to_transform=[1, 3])
    layers = {
        name.split(".layer.")[1][0] for name, module in model.named_modules() if isinstance(module, MixtureLinear)
    }
    assert layers == {"1", "3"}


@methods
def test_all_linear_leaves_the_output_layer_out(method: str) -> None:
    names = [name for name, module in adapted(method, "llama").named_modules() if isinstance(module, MixtureLinear)]
    assert len(names) == 4 * 7 and not any("lm_head" in name for name in names)
    twice = adapted(method, "llama")
    twice.add_adapter("second", make_config(method, "llama"))
    assert sum(isinstance(module, MixtureLinear) for module in twice.modules()) == 4 * 7


@pytest.mark.parametrize("options", [{"target_modules": ["nothing"]}, {"layers_to_transform": [9]}])
@methods
def test_an_adapter_that_matches_nothing_is_an_error(method: str, options: dict) -> None:
    with pytest.raises(ValueError, match="not found in the base model"):
        adapted(method, "bert", **options)


@methods
def test_a_layer_that_is_never_called_is_an_error(method: str) -> None:
    network, options = nn.Sequential(nn.MultiheadAttention(8, 2)), {"experts": 2} if method == "mola" else {}
    with pytest.raises(ValueError, match=r"out_proj of a torch\.nn\.MultiheadAttention, which reads its weight"):
        get_peft_model(network, make_config(method, "mlp", target_modules=["out_proj"], **options))


@methods
def test_what_cannot_be_adapted_is_an_error(method: str) -> None:
    with pytest.raises(ValueError, match=r"Embedding; mixtures of LoRA adapt nn.Linear and transformers' Conv1D"):
        adapted(method, "llama", target_modules=["embed_tokens"], **({"experts": 2} if method == "mola" else {}))


@methods
def test_encoder_decoders_are_refused(method: str) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match="an encoder and a decoder"):
        get_peft_model(model, make_config(method, "mlp", target_modules=["q"]))
    assert not model._forward_pre_hooks


@methods
def test_names_of_parts_are_no_adapter_names(method: str) -> None:
    with pytest.raises(ValueError, match="choose another"):
        get_peft_model(make_base("mlp"), make_config(method, "mlp"), adapter_name="router")


@methods
def test_one_batch_for_several_adapters_is_refused(method: str) -> None:
    model = adapted(method, "bert")
    with pytest.raises(ValueError, match="one batch per adapter"):
        model(**make_inputs("bert"), adapter_names=["default"] * 3)


def rewrite(folder: Path, rename: dict[str, str | None]) -> None:
    """Rename saved tensors by the ends of their names; None removes them."""
    path = folder / "adapter_model.safetensors"
    saved = load_file(path)
    for old, new in rename.items():
        for name in [name for name in saved if name.endswith(old)]:
            value = saved.pop(name)
            if new is not None:
                saved[name.removesuffix(old) + new] = value
    save_file(saved, path, metadata={"format": "pt"})


@methods
def test_a_file_without_a_router_is_an_error(method: str, tmp_path: Path) -> None:
    """PEFT would warn, and route at random."""
    adapted(method, "mlp").save_pretrained(tmp_path)
    rewrite(tmp_path, {f"layers.1.{method}_experts.router.weight": None})
    with pytest.raises(CheckpointError, match=r"Missing: .*layers\.1\..*router\.weight\. Left over: nothing"):
        PeftModel.from_pretrained(make_base("mlp"), tmp_path)


@methods
def test_a_file_with_more_than_the_adapter_is_an_error(method: str, tmp_path: Path) -> None:
    adapted(method, "mlp").save_pretrained(tmp_path)
    rewrite(tmp_path, {"router.weight": "gate.weight"})
    with pytest.raises(CheckpointError, match=r"router\.weight\. Left over: .*gate\.weight"):
        PeftModel.from_pretrained(make_base("mlp"), tmp_path)


def test_biases_in_a_file_for_an_adapter_without_are_an_error(tmp_path: Path) -> None:
    adapted("smora", "mlp").save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"balance": False}))
    with pytest.raises(CheckpointError, match=r"Left over: .*expert_bias"):
        PeftModel.from_pretrained(make_base("mlp"), tmp_path)


@methods
def test_merging_is_refused_where_gates_depend_on_the_input(method: str) -> None:
    model = adapted(method, "mlp")
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for merge in (model.merge_adapter, model.merge_and_unload, lambda: model.merge_adapter(["default"])):
        with pytest.raises(ValueError, match="gates depend on the input"):
            merge()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_merging_is_all_or_nothing() -> None:
    """The first layers have a single expert and could be merged, the last could not."""
    model = adapted("mola", "mlp", experts=[1, 1, 1, 2], top_k=1)
    weight = model.base_model.model.layers[0].base_layer.weight.clone()
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="gates depend"):
            merge()
        assert torch.equal(model.base_model.model.layers[0].base_layer.weight, weight)


CONSTANT = {"smora": {"score": "none", "top_k": 8}, "mola": {"experts": 1, "top_k": 1}}


@matrix
def test_constant_adapters_merge(method: str, network: str) -> None:
    model, inputs = adapted(method, network, **CONSTANT[method]), make_inputs(network)
    expected, base = output(model, inputs), output(make_base(network), inputs)
    assert not torch.allclose(expected, base, atol=1e-3)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(output(model, inputs), expected, atol=1e-4, rtol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(output(model, inputs), base, atol=1e-4, rtol=1e-4)
    model.merge_adapter()
    model.unmerge_adapter()
    torch.testing.assert_close(output(model, inputs), expected, atol=1e-4, rtol=1e-4)
    merged = model.merge_and_unload()
    torch.testing.assert_close(output(merged, inputs), expected, atol=1e-4, rtol=1e-4)
    assert not any(isinstance(module, MixtureLinear) for module in merged.modules())
    assert not merged._forward_pre_hooks and not merged._forward_hooks


@methods
def test_a_broken_adapter_is_not_merged_safely(method: str) -> None:
    model = adapted(method, "mlp", **CONSTANT[method])
    next(module for module in model.modules() if isinstance(module, LoraMixture)).lora_B.data.fill_(float("inf"))
    weight = model.base_model.model.layers[0].base_layer.weight.clone()
    with pytest.raises(ValueError, match="not finite"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(model.base_model.model.layers[0].base_layer.weight, weight)


@pytest.mark.parametrize("network", ["bert", "llama", "gpt2"])
@methods
def test_a_bfloat16_base_keeps_its_adapters_in_float32(method: str, network: str, tmp_path: Path) -> None:
    model = get_peft_model(make_base(network).bfloat16(), make_config(method, network)).eval()
    inputs = make_inputs(network)
    parts = {name: p for name, p in model.named_parameters() if f"{method}_experts" in name}
    assert {p.dtype for p in parts.values()} == {torch.float32}
    out = output(model, inputs)
    assert out.dtype == torch.bfloat16
    exact = get_peft_model(make_base(network), make_config(method, network)).eval()
    exact.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    difference = (out.float() - output(exact, inputs)).abs()
    # Rounding turns some choices over.
    assert difference.median() < 0.06 * output(exact, inputs).abs().median()
    train_step(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base(network).bfloat16(), tmp_path)
    assert torch.equal(output(loaded, inputs), output(model, inputs))
    narrow = get_peft_model(make_base(network).bfloat16(), make_config(method, network), autocast_adapter_dtype=False)
    assert {p.dtype for name, p in narrow.named_parameters()} == {torch.bfloat16}
    assert output(narrow, inputs).isfinite().all()


@methods
def test_generation_is_that_of_the_whole_sequence(method: str) -> None:
    """With a cache, a padded prompt, and the adapters at work in every step."""
    model, inputs = adapted(method, "llama"), make_inputs("llama")
    with record_usage(model) as usage:
        generated = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    # 18 real positions of the prompts, and three steps of three rows.
    assert {one.units for one in usage.values()} == {18 + 9}
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 4, dtype=torch.long)], 1)
    logits = output(model, {"input_ids": generated, "attention_mask": mask})
    logits[..., 2] = -torch.inf  # the end of a text, which min_new_tokens forbids
    assert torch.equal(logits[:, 6:-1].argmax(-1), generated[:, 7:])
    assert not torch.equal(generated, make_base("llama").generate(**inputs, max_new_tokens=4, do_sample=False))


@methods
def test_copies_are_independent(method: str) -> None:
    model, inputs = adapted(method, "bert"), make_inputs("bert")
    expected = output(model, inputs)
    twin = copy.deepcopy(model)
    train_step(twin, inputs)
    assert torch.equal(output(model, inputs), expected) and not torch.equal(output(twin, inputs), expected)
    with record_usage(twin) as usage:
        output(twin, inputs)
    assert {one.units for one in usage.values()} == {18}, "the copy knows its own padding"


@methods
def test_traces_read_adapters(method: str) -> None:
    model = adapted(method, "bert")
    with record_trace(model) as trace:
        output(model, make_inputs("bert"))
    layer = trace[trace.names[0]]
    assert layer.sample_index.bincount().tolist() == [4, 7, 7]
    assert layer.num_experts == (8 if method == "smora" else 2)


@methods
def test_injection_without_a_peft_model(method: str) -> None:
    inputs = make_inputs("bert")
    torch.manual_seed(0)
    expected = output(adapted(method, "bert"), inputs)
    injected = inject_adapter_in_model(make_config(method, "bert"), make_base("bert"))
    assert torch.equal(output(injected, inputs), expected)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@methods
def test_a_refused_configuration_can_be_corrected_on_the_same_network(method: str) -> None:
    base, inputs = make_base("bert"), make_inputs("bert")
    wrong = "all-linear" if method == "mola" else ["query", "word_embeddings"]
    with pytest.raises(ValueError, match=r"exclude_modules=\['bert.pooler.dense'\]|Embedding"):
        get_peft_model(base, make_config(method, "bert", target_modules=wrong))
    model = get_peft_model(base, make_config(method, "bert"))
    with record_usage(model) as usage:
        output(model, inputs)
    assert {one.units for one in usage.values()} == {18}


@methods
def test_target_modules_have_defaults(method: str) -> None:
    model = adapted(method, "llama", target_modules=None)
    lora = get_peft_model(make_base("llama"), LoraConfig())
    assert model.base_model.targeted_module_names == lora.base_model.targeted_module_names


def test_the_three_lines() -> None:
    for config in (
        SmoraConfig(r=64, top_k=8, target_modules="all-linear"),
        MolaConfig(r=8, top_k=2, experts="2-4-6-8"),
    ):
        model = get_peft_model(make_base("llama"), config)
        inputs = make_inputs("llama")
        torch.testing.assert_close(output(model.eval(), inputs), output(make_base("llama"), inputs))


def test_new_types_are_members_like_others() -> None:
    assert PeftType("SMORA") is PeftType.SMORA and PeftType["MOLA"] is PeftType.MOLA
    assert {"SMORA", "MOLA", "LORA"} <= {member.value for member in PeftType}
    assert isinstance(PeftType.SMORA, PeftType) and PeftType.SMORA == "SMORA" and PeftType.SMORA.name == "SMORA"
    assert json.dumps(PeftType.SMORA) == '"SMORA"' and f"{PeftType.MOLA!r}" == "<PeftType.MOLA: 'MOLA'>"
    assert copy.deepcopy(PeftType.SMORA) is PeftType.SMORA
