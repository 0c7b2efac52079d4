"""Load the model of a folder as users do, in a separate process; the checks of the files must have passed.

Weights are loaded from safetensors only, in float32. With `code="own"` the code of the folder is executed, and importing
`minigpt_hf` is disabled.
"""

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.utils import logging

from . import behaviour, tokenizer
from .folder import Folder
from .row import NotApplicable, Row, check, failed, passed, some
from .weights import files_of

REMEDY = "see the checks above; otherwise export the folder again"


class LoadedFolder:
    """A folder and the models loaded from it."""

    def __init__(self, path: Path):
        self.folder = Folder(path)
        self.path = str(path)
        self.config = self.folder.json("config.json")
        self.is_minigpt = self.config.get("model_type") == "minigpt"
        self.native: PreTrainedModel | None = None  # instance of a transformers class
        self.own: PreTrainedModel | None = None  # instance of this package's class, or of that in the folder's code

    @property
    def model(self) -> PreTrainedModel:
        """The model that `AutoModelForCausalLM` returns."""
        model = self.own or self.native
        if model is None:
            raise NotApplicable("no model was loaded")
        return model

    def load(self, trust_remote_code: bool = False) -> PreTrainedModel:
        """Load with `AutoModelForCausalLM`; missing or unexpected tensors are an error."""
        config = AutoConfig.from_pretrained(self.path, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            self._check_size(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))
        return _without_errors(
            AutoModelForCausalLM.from_pretrained(
                self.path,
                config=config,
                trust_remote_code=trust_remote_code,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
            )
        )

    def load_twin(self) -> PreTrainedModel:
        """Load the weights of a MiniGPT into `Qwen3ForCausalLM`."""
        names = Qwen3Config().to_dict().keys() - {"model_type", "architectures", "transformers_version"}
        config = Qwen3Config(**{name: self.config[name] for name in names if name in self.config})
        with torch.device("meta"):
            self._check_size(Qwen3ForCausalLM(config))
        return _without_errors(
            Qwen3ForCausalLM.from_pretrained(
                self.path, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
        )

    def _check_size(self, empty: PreTrainedModel) -> None:
        """Raise `ValueError` if the model has more parameters than the files can contain, before memory is allocated."""
        parameters, size = empty.num_parameters(), sum(self.folder.files[name] for name in files_of(self.folder))
        if parameters > 4 * size:  # at most four values per byte, with quantization
            raise ValueError(f"config.json defines {parameters:,} parameters, but the files have {size:,} bytes")


def _without_errors(loaded: tuple[PreTrainedModel, dict]) -> PreTrainedModel:
    model, report = loaded
    kinds = {"missing_keys": "missing", "unexpected_keys": "unexpected", "mismatched_keys": "of wrong shape"}
    for name, kind in kinds.items():
        if report[name]:
            raise ValueError(f"{kind}: {some(sorted(map(str, report[name])))}")
    return model.eval()


def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """[B, T] -> [B, T, V]"""
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@check("loads natively", "loading failed")
def natively(subject: LoadedFolder) -> Row:
    kind = subject.config.get("model_type")
    if subject.is_minigpt:
        subject.native = subject.load_twin()
        return passed("as Qwen3ForCausalLM")
    if kind not in CONFIG_MAPPING_NAMES:
        raise NotApplicable(f"transformers has no model type {kind!r}")
    subject.native = subject.load()
    return passed(f"as {type(subject.native).__name__}")


@check("loads with the package", "loading failed")
def with_the_package(subject: LoadedFolder) -> Row:
    if not subject.is_minigpt:
        raise NotApplicable("not a MiniGPT")
    import_module("minigpt_hf")  # registers its classes; this process does not execute the folder's code
    subject.own = subject.load()
    return _compared(subject, "by minigpt_hf")


@check("loads without the package", "loading failed")
def without_the_package(subject: LoadedFolder) -> Row:
    sys.modules["minigpt_hf"] = None  # type: ignore[assignment]  # makes importing it fail; unknown to the type stub
    subject.own = subject.load(trust_remote_code=True)
    if not type(subject.own).__module__.startswith("transformers_modules"):
        return passed(f"as {type(subject.own).__name__} of transformers: its code is not used")
    if subject.is_minigpt:
        subject.native = subject.load_twin()
    return _compared(subject, "by its own code")


def _compared(subject: LoadedFolder, how: str) -> Row:
    if subject.native is None:
        return passed(how)
    ids = behaviour.prompt(subject.own)
    ours, theirs = logits(subject.own, ids), logits(subject.native, ids)
    if not torch.equal(ours, theirs):
        distance = (ours - theirs).abs().max().item()
        return failed(f"{how}, but its logits differ by {distance:.2g} from the native model's", REMEDY)
    return passed(f"{how}, with logits bitwise equal to the native model's")


@check("tokenizer loads", "loading failed")
def tokenizer_loads(subject: LoadedFolder) -> Row:
    """`AutoTokenizer` can silently build a different tokenizer from the one in `tokenizer.json`."""
    if "tokenizer.json" not in subject.folder.files:
        raise NotApplicable("there is no tokenizer.json")
    if "auto_map" in subject.folder.json_if_there("tokenizer_config.json"):
        raise NotApplicable("the tokenizer is defined by code of the folder")
    reference = tokenizer.load(subject.folder)
    loaded = AutoTokenizer.from_pretrained(subject.path, trust_remote_code=False)
    known = {token.content for token in reference.get_added_tokens_decoder().values()}
    if added := sorted({str(token) for token in loaded.added_tokens_decoder.values()} - known):
        return failed(
            f"{type(loaded).__name__} makes {some([*map(repr, added)])} a token, which tokenizer.json does not",
            "remove it from tokenizer_config.json, added_tokens.json and special_tokens_map.json",
        )
    specials = "".join(dict.fromkeys(text for text in tokenizer.specials(subject.folder).values() if text in known))
    for text in (*tokenizer.texts_of(reference), specials):
        expected = reference.encode(text, add_special_tokens=False).ids
        if loaded(text, add_special_tokens=False).input_ids != expected:
            return failed(
                f"{type(loaded).__name__} encodes {text!r} differently from tokenizer.json",
                "remove `split_special_tokens` from tokenizer_config.json"
                if loaded.split_special_tokens
                else 'set `"tokenizer_class": "PreTrainedTokenizerFast"` in tokenizer_config.json',
            )
    return passed(f"as {type(loaded).__name__}, with the ids of tokenizer.json")


@check("meta load = plain load")
def meta_equals_plain(subject: LoadedFolder) -> Row:
    """`from_pretrained` builds the model on the meta device, where non-persistent buffers can be left uninitialized."""
    model = subject.model
    plain = type(model)(model.config).to(torch.float32).eval()
    stored: dict[str, torch.Tensor] = {}
    for name in files_of(subject.folder):
        stored |= load_file(subject.folder.path / name)
    if stored.keys() - plain.state_dict().keys():
        raise NotApplicable("this architecture renames its weights when loading")
    plain.load_state_dict(stored, strict=False)
    plain.tie_weights()
    here = {**dict(model.named_buffers()), **model.state_dict()}
    there = {**dict(plain.named_buffers()), **plain.state_dict()}
    if wrong := sorted(name for name in here.keys() | there.keys() if not _equal(here.get(name), there.get(name))):
        return failed(f"different: {some(wrong)}", "initialize buffers in `_init_weights`")
    ids = behaviour.prompt(model)
    if not torch.equal(logits(model, ids), logits(plain, ids)):
        return failed("equal weights and buffers have different logits", "store no other state in `__init__`")
    return passed("equal weights, buffers and logits")


def _equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is not None and b is not None and torch.equal(a, b)


def rows(path: Path, code: str) -> Iterator[Row]:
    """Load the model and check its behavior.

    Args:
        code: "package" (load natively and with the package), "loads" (the same, without checks of the behavior), or "own"
            (load with the code of the folder).
    """
    logging.set_verbosity_error()
    subject = LoadedFolder(path)
    for load in (without_the_package,) if code == "own" else (natively, with_the_package, tokenizer_loads):
        yield load(subject)
    if code == "loads":
        return
    yield meta_equals_plain(subject)
    for check_behavior in behaviour.CHECKS:
        yield check_behavior(subject)
