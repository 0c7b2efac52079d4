"""Does it load, as strangers load it? In a clean process; `rows` is its whole story.

In: a folder whose files were found sound. Out: rows. Weights come from safetensors only, in float32. The folder's own
code runs if `code` is "own", and then nothing else does: the package `minigpt_hf` is hidden from it.
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

REMEDY = "see the rows above; else write the folder anew with what made it"


class Patient:
    """A folder, and the models that were loaded from it."""

    def __init__(self, path: Path):
        self.folder = Folder(path)
        self.path = str(path)
        self.config = self.folder.json("config.json")
        self.is_minigpt = self.config.get("model_type") == "minigpt"
        self.native: PreTrainedModel | None = None  # loaded by a class of transformers
        self.own: PreTrainedModel | None = None  # loaded by ours, or by the folder's own code

    @property
    def model(self) -> PreTrainedModel:
        """The one to look at: what `AutoModelForCausalLM` gives a user."""
        model = self.own or self.native
        if model is None:
            raise NotApplicable("no model was loaded")
        return model

    def load(self, trust_remote_code: bool = False) -> PreTrainedModel:
        """By `AutoModelForCausalLM`; every tensor of the files and of the model has to find the other."""
        config = AutoConfig.from_pretrained(self.path, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            self._refuse_inflation(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))
        return _whole(
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
        """A MiniGPT as `Qwen3ForCausalLM`: another configuration for the same weights."""
        names = Qwen3Config().to_dict().keys() - {"model_type", "architectures", "transformers_version"}
        config = Qwen3Config(**{name: self.config[name] for name in names if name in self.config})
        with torch.device("meta"):
            self._refuse_inflation(Qwen3ForCausalLM(config))
        return _whole(
            Qwen3ForCausalLM.from_pretrained(
                self.path, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
        )

    def _refuse_inflation(self, empty: PreTrainedModel) -> None:
        """A configuration may ask for more numbers than the files hold, and fill the memory before anybody notices."""
        asked, held = empty.num_parameters(), sum(self.folder.files[name] for name in files_of(self.folder))
        if asked > 4 * held:  # four numbers in a byte: no quantization is denser
            raise ValueError(f"config.json asks for {asked:,} numbers, and the files have {held:,} bytes")


def _whole(loaded: tuple[PreTrainedModel, dict]) -> PreTrainedModel:
    model, report = loaded
    kinds = {"missing_keys": "missing", "unexpected_keys": "not asked for", "mismatched_keys": "of wrong shape"}
    for name, kind in kinds.items():
        if report[name]:
            raise ValueError(f"{kind}: {some(sorted(map(str, report[name])))}")
    return model.eval()


def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """[B, T] -> [B, T, V]"""
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@check("loads natively", "it does not load")
def natively(patient: Patient) -> Row:
    kind = patient.config.get("model_type")
    if patient.is_minigpt:
        patient.native = patient.load_twin()
        return passed("as Qwen3ForCausalLM, with no code but transformers'")
    if kind not in CONFIG_MAPPING_NAMES:
        raise NotApplicable(f"transformers has no model type {kind!r}")
    patient.native = patient.load()
    return passed(f"as {type(patient.native).__name__}")


@check("loads with the package", "it does not load")
def with_the_package(patient: Patient) -> Row:
    if not patient.is_minigpt:
        raise NotApplicable("not a MiniGPT")
    import_module("minigpt_hf")  # registers its classes; in this process the folder's code never runs
    patient.own = patient.load()
    return _compared(patient, "by minigpt_hf")


@check("loads without the package", "it does not load")
def without_the_package(patient: Patient) -> Row:
    sys.modules["minigpt_hf"] = None  # importing it fails: the folder has to do without
    patient.own = patient.load(trust_remote_code=True)
    if not type(patient.own).__module__.startswith("transformers_modules"):
        return passed(f"as {type(patient.own).__name__} of transformers: its own code is not used")
    if patient.is_minigpt:
        patient.native = patient.load_twin()
    return _compared(patient, "by its own code")


def _compared(patient: Patient, how: str) -> Row:
    if patient.native is None:
        return passed(how)
    ids = behaviour.prompt(patient.own)
    ours, theirs = logits(patient.own, ids), logits(patient.native, ids)
    if not torch.equal(ours, theirs):
        distance = (ours - theirs).abs().max().item()
        return failed(f"{how}, but its logits are {distance:.2g} away from the native ones", REMEDY)
    return passed(f"{how}, with the native logits bit for bit")


@check("tokenizer loads", "it does not load")
def tokenizer_loads(patient: Patient) -> Row:
    """`AutoTokenizer` may build another tokenizer than `tokenizer.json` describes, without a word."""
    if "tokenizer.json" not in patient.folder.files:
        raise NotApplicable("there is no tokenizer.json")
    if "auto_map" in patient.folder.json_if_there("tokenizer_config.json"):
        raise NotApplicable("the tokenizer is code of the folder")
    reference = tokenizer.load(patient.folder)
    loaded = AutoTokenizer.from_pretrained(patient.path, trust_remote_code=False)
    for text in tokenizer.texts_of(reference):
        expected = reference.encode(text, add_special_tokens=False).ids
        if loaded(text, add_special_tokens=False).input_ids != expected:
            return failed(
                f"{type(loaded).__name__} gives {text!r} other ids than tokenizer.json",
                'name `"tokenizer_class": "PreTrainedTokenizerFast"` in tokenizer_config.json',
            )
    return passed(f"as {type(loaded).__name__}, with the ids of tokenizer.json")


@check("meta load = plain load")
def meta_equals_plain(patient: Patient) -> Row:
    """`from_pretrained` builds the model without memory and fills it; buffers that are not in the file can be forgotten."""
    model = patient.model
    plain = type(model)(model.config).to(torch.float32).eval()
    kept = {}
    for name in files_of(patient.folder):
        kept |= load_file(patient.folder.path / name)
    if kept.keys() - plain.state_dict().keys():
        raise NotApplicable("this architecture renames its weights while it loads them")
    plain.load_state_dict(kept, strict=False)
    plain.tie_weights()
    here = {**dict(model.named_buffers()), **model.state_dict()}
    there = {**dict(plain.named_buffers()), **plain.state_dict()}
    if wrong := sorted(name for name in here.keys() | there.keys() if not _equal(here.get(name), there.get(name))):
        return failed(f"not the same: {some(wrong)}", "restore buffers in `_init_weights`")
    ids = behaviour.prompt(model)
    if not torch.equal(logits(model, ids), logits(plain, ids)):
        return failed(
            "equal weights and buffers give other logits", "let `__init__` keep nothing but weights and buffers"
        )
    return passed("weights, buffers and logits")


def _equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is not None and b is not None and torch.equal(a, b)


def rows(path: Path, code: str) -> Iterator[Row]:
    """Load, and look how the model behaves.

    Args:
        code: "package" (natively and with the package), "loads" (the same, with no look at behaviour), or "own" (by the
            folder's own code).
    """
    logging.set_verbosity_error()
    patient = Patient(path)
    for load in (without_the_package,) if code == "own" else (natively, with_the_package, tokenizer_loads):
        yield load(patient)
    if code == "loads":
        return
    yield meta_equals_plain(patient)
    for look in behaviour.CHECKS:
        yield look(patient)
