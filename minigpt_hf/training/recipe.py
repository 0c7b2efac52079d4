"""Recipes, flags and keywords as settings, and settings as a recipe.

A recipe is a YAML file whose keys are names of settings, in `recipes/` or elsewhere; flags and keywords override it.
"""

import copy
import difflib
import math
import os
import re
import reprlib
import sys
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser, TrainingArguments

from ..errors import MiniGPTError
from .arguments import (
    AUTO,
    GROUPS,
    OF_THE_MODEL,
    MiniGPTTrainingArguments,
    Settings,
    log_once,
    settings_known,
)
from .scaling import heads_for

LONGEST = 1 << 16  # bytes of a recipe
RECIPES = files("minigpt_hf") / "training" / "recipes"


def parse_arguments(argv: Sequence[str], recipe: str | None = None, **overrides: Any) -> Settings:
    """A recipe, overridden by flags or by keywords -> the dataclasses.

    Args:
        argv: Flags, as on the command line.
        recipe: Name or YAML file. Default: `lora` with `lora_rank`, `finetune` with `init_from`, none with `minutes` or
            `size`, `auto` with `data`, else `demo`.
        overrides: The same settings as flags, by name.

    Raises:
        MiniGPTError: for an unknown recipe, key or flag, naming the nearest ones; or an invalid value.
    """
    flags = [flag.partition("=")[0].lstrip("-").replace("-", "_") for flag in argv if flag.startswith("--")]
    # HfArgumentParser adds --no_X for each X that is true by default.
    flags = [name if name in settings_known() else name.removeprefix("no_") for name in flags]
    given = {*flags, *overrides}
    for value in (recipe, *argv, *overrides.values()):
        if isinstance(value, str) and not _is_unicode(value) and not Path(value).exists():  # file names are bytes
            raise MiniGPTError(
                f"argument {value!r}: is not valid text in the encoding of this system, {sys.getfilesystemencoding()}; "
                "use a name in UTF-8, and set PYTHONUTF8=1"
            )
    overrides = {name: os.fspath(each) if isinstance(each, os.PathLike) else each for name, each in overrides.items()}
    overrides = _checked(overrides)
    if recipe is None:
        recipe = _default_recipe(given)
    of_recipe = read_recipe(recipe) if recipe else {}
    values = {"output_dir": f"runs/{Path(recipe or 'dial').stem}", **of_recipe, **overrides}
    for layer in (given, of_recipe):  # a number of epochs takes precedence over the number of steps of a layer below
        if "max_steps" in layer:
            break
        if "num_train_epochs" in layer:
            values["max_steps"] = -1
            break
    parser = argument_parser(prog="minigpt train")
    parser.set_defaults(**values)
    try:
        data, model, training, unknown = parser.parse_args_into_dataclasses(
            list(argv), return_remaining_strings=True, look_for_args_file=False
        )
    except MiniGPTError:
        raise
    except (ValueError, TypeError, ImportError) as error:  # of `TrainingArguments`
        raise MiniGPTError(str(error)) from error
    if unknown:
        raise MiniGPTError(
            f"unknown argument {unknown[0]}{_nearest(unknown[0].lstrip('-').replace('-', '_'), settings_known())}"
        )
    settings = Settings(data, model, training)
    if model.init_from:
        if training.minutes or training.size:
            raise MiniGPTError(
                "--minutes and --size choose a shape, and --init_from brings its own: leave out one of them"
            )
        if theirs := sorted(given & (OF_THE_MODEL | {"tokenizer", "vocab_size"})):
            raise MiniGPTError(f"--{theirs[0]} comes with the model of --init_from {model.init_from}: leave it out")
        settings = settings.replace(tokenizer=model.init_from)
    settings = _with_settings_of_a_prepared_text(settings, given)
    if model.lora_rank < 0:
        raise MiniGPTError(f"lora_rank is {model.lora_rank}: it must be at least 0")
    if not model.init_from and (model.lora_rank or recipe == "finetune"):
        raise MiniGPTError("there is no model to start from: name a folder or a Hub id with --init_from")
    if model.lora_rank and training.muon:
        raise MiniGPTError("--lora_rank: LoRA is trained with AdamW: add --no_muon, or use --recipe lora")
    settings = settings.replace(given=frozenset(given | values.keys()), given_in_command=frozenset(given))
    training = settings.training
    if training.minutes and "num_train_epochs" in training.given:
        raise MiniGPTError("--minutes chooses how long to train, and num_train_epochs is given: leave out one of them")
    if training.minutes and "max_steps" in training.given:
        where = "leave it out" if "max_steps" in given else f"recipe {recipe} sets it: leave out the recipe"
        raise MiniGPTError(f"--minutes chooses max_steps, which is given: {where}")
    if training.size == AUTO and training.minutes:
        raise MiniGPTError("--minutes and --size auto both choose how long to train: leave out one of them")
    if settings.data.validation_fraction == 0:
        settings = settings.replace(eval_strategy="no", do_eval=False, load_best_model_at_end=False)
    if settings.data.data != of_recipe.get("data", settings.data.data):
        settings = _without_description_of_another_text(settings, of_recipe, given)
    if given >= {"max_steps", "num_train_epochs"} and training.max_steps > 0:
        log_once(training, f"max_steps {training.max_steps} takes precedence over num_train_epochs")
    if not model.init_from and training.size != AUTO:
        settings = _with_fitting_heads(settings, given)
    return settings


def _with_settings_of_a_prepared_text(settings: Settings, given: set[str]) -> Settings:
    """Replace the settings of a recipe by those that a prepared text was made with.

    Raises:
        MiniGPTError: if a flag or keyword asks for another text than the prepared one.
    """
    from ..data.corpus import public_name  # imports `datasets`, which `--help` does not need
    from ..data.prepared import is_prepared, prepared_settings

    data = settings.data
    if not is_prepared(data.data):
        return settings
    stored = prepared_settings(Path(data.data))
    if stored["tokenizer"] != "bpe" and "vocab_size" in given:
        del stored["vocab_size"]  # it has no effect on another tokenizer, which `AutoConfigurator` reports
    asked = {name: vars(data)[name] for name in stored if name in given}
    if "tokenizer" in asked:
        asked["tokenizer"] = public_name(data.tokenizer)
    if other := [name for name, value in asked.items() if value != stored[name]]:
        flags = ", ".join(f"--{name} {asked[name]}" for name in other)
        made_with = ", ".join(f"{name} {stored[name]}" for name in other)
        raise MiniGPTError(
            f"{flags}: {data.data} was prepared with {made_with}; leave out what differs, or prepare the text again with "
            "`minigpt tokenize`"
        )
    return settings.replace(**stored)


def _is_unicode(text: str) -> bool:
    """Whether it can be written as UTF-8: bytes that Python cannot decode are lone surrogates in an argument."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _default_recipe(given: set[str]) -> str | None:
    if given & {"minutes", "size"}:
        return None
    for setting, recipe in (("lora_rank", "lora"), ("init_from", "finetune"), ("data", "auto")):
        if setting in given:
            return recipe
    return "demo"


def _without_description_of_another_text(settings: Settings, recipe: dict[str, Any], given: set[str]) -> Settings:
    """Drop language, license and prompt of a recipe: they describe the text of the recipe, not one given in its place."""
    dropped = {name for name in ("language", "license", "sample_prompt") if name in recipe and name not in given}
    if not dropped:
        return settings
    described = ", ".join(f"{name} {recipe[name]!r}" for name in sorted(dropped))
    log_once(
        settings.training,
        f"--data {settings.data.data} replaces the text of the recipe, {recipe['data']}: the recipe's {described} not used",
    )
    empty = {"language": [], "license": None, "sample_prompt": None}
    return settings.replace(**{name: empty[name] for name in dropped}, given=settings.training.given - dropped)


def _with_fitting_heads(settings: Settings, given: set[str]) -> Settings:
    """Choose the number of heads if only the width was given and the recipe's number of heads does not divide it."""
    model = settings.model
    heads, width = model.num_attention_heads, model.hidden_size
    if "hidden_size" not in given or given & {"num_attention_heads", "head_dim"} or model.head_dim or heads < 1:
        return settings
    fits = width % heads == 0 and width // heads % 2 == 0
    if fits or width < 1 or (chosen := heads_for(width, model.num_key_value_heads or 1)) is None:
        return settings  # if nothing fits, the architecture is refused with the reason
    log_once(
        settings.training,
        f"num_attention_heads {chosen}: hidden_size {width} does not divide into {heads} heads of even width; "
        f"each head has width {width // chosen}",
    )
    return settings.replace(num_attention_heads=chosen)


class _Parser(HfArgumentParser):
    def error(self, message: str):
        raise MiniGPTError(message)


def argument_parser(**kwargs) -> HfArgumentParser:
    """The parser of every flag there is; abbreviations are not guessed, and a bad value is a `MiniGPTError`."""
    return _Parser(GROUPS, allow_abbrev=False, **kwargs)


# What the recipe `auto` leaves to the text: see `dial`.
CHOSEN_FROM_THE_TEXT = (
    *("vocab_size", "block_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "residual_dropout"),
    *("per_device_train_batch_size", "max_steps", "warmup_steps", "learning_rate", "weight_decay", "logging_steps"),
    *("eval_steps", "sample_prompt"),
)


def effective_defaults() -> dict[str, tuple[str, str]]:
    """What a training uses without any flag (the recipe `demo`), and with `--data` alone (`auto`), by name of the setting.

    Settings about which neither recipe says anything have the defaults of their dataclasses.
    """
    demo, auto = read_recipe("demo"), read_recipe("auto")
    defaults = {}
    for each in (each for group in GROUPS for each in fields(group) if each.init and each.name != "data"):
        if each.name not in {*demo, *auto, *CHOSEN_FROM_THE_TEXT}:
            continue
        own = each.default if each.default is not MISSING else None
        without, alone = demo.get(each.name, own), auto.get(each.name, own)
        alone = "chosen from the text" if each.name in CHOSEN_FROM_THE_TEXT else _written(alone)
        defaults[each.name] = (_written(without), alone)
    return defaults


def _written(value: Any) -> str:
    """A default as the help shows it."""
    return "none" if value in (None, "", []) else ", ".join(value) if isinstance(value, list) else str(value)


def read_recipe(name: str) -> dict[str, Any]:
    """The settings of a named recipe, or of a YAML file.

    Raises:
        MiniGPTError: if there is no such recipe, it is no YAML mapping, or a key is not the name of a setting.
    """
    if name.endswith((".yaml", ".yml")):
        source = Path(name)
        if not source.is_file():
            raise MiniGPTError(f"recipe {name}: no such file")
        if source.stat().st_size > LONGEST:
            raise MiniGPTError(f"recipe {name}: has more than {LONGEST:,} bytes; a recipe has some hundred")
    else:
        source = RECIPES / f"{name}.yaml"
        if not source.is_file():
            raise MiniGPTError(
                f"unknown recipe {name!r}{_nearest(name, recipe_names())}; known: {', '.join(recipe_names())}"
            )
    try:
        settings = load_yaml(source.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError included
        raise MiniGPTError(f"recipe {name}: not YAML: {' '.join(str(error).split())}") from error
    settings = {} if settings is None else settings
    if not isinstance(settings, dict):
        raise MiniGPTError(f"recipe {name}: expected lines of `key: value`, found a {type(settings).__name__}")
    return _checked(settings, f"recipe {name}: ")


def _checked(settings: dict[str, Any], origin: str = "") -> dict[str, Any]:
    """Settings by name, with the types of their fields; a number that is text becomes one where a fraction is expected.

    Raises:
        MiniGPTError: beginning with `origin`, for an unknown name or a value of another type.
    """
    known, settings = settings_known(), dict(settings)
    optional = {each.name for group in GROUPS for each in fields(group) if each.default is None}
    for key, value in settings.items():
        if key not in known:
            raise MiniGPTError(f"{origin}unknown setting {key!r}{_nearest(str(key), known)}")
        if key == "size" and isinstance(value, int | float) and not isinstance(value, bool):
            value = settings[key] = str(value)
        kind = next((kind for kind in (bool, int, float, str) if known[key] in (kind, kind | None)), None)
        allowed = {bool: bool | str, int: int | float | str, float: int | float | str, str: str}
        if kind and value is None and key not in optional and not isinstance(None, known[key]):
            raise MiniGPTError(f"{origin}{key} is None: expected one {kind.__name__}")
        if kind and value is not None:
            right = isinstance(value, allowed[kind]) and (kind is bool or not isinstance(value, bool))
            if not right:
                raise MiniGPTError(f"{origin}{key} is {reprlib.repr(value)}: expected one {kind.__name__}")
        if kind is float and isinstance(value, str):  # YAML reads 4e-3 as text: its numbers want a point, 4.0e-3
            try:
                value = settings[key] = float(value)
            except ValueError as error:
                raise MiniGPTError(f"{origin}{key} is {reprlib.repr(value)}: expected a number") from error
        if isinstance(value, float):
            if not math.isfinite(value):
                raise MiniGPTError(f"{origin}{key} is {value}: expected a finite number")
            if kind is int:
                raise MiniGPTError(f"{origin}{key} is {value}: expected a whole number")
        if isinstance(value, int) and abs(value) >= 1 << 63:
            raise MiniGPTError(f"{origin}{key} is a number of {value.bit_length()} bits; at most 63 are possible")
    return settings


class _Loader(yaml.SafeLoader):
    """Plain values only: a key that is there twice and references, which can multiply without end, are refused."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(
                None, None, "references (&, *) are not taken", self.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for each, _ in node.value:
            key = self.construct_object(each, deep=True)
            if key in seen:
                problem = f"the key {reprlib.repr(key)} is there twice"
                raise yaml.constructor.ConstructorError(None, None, problem, each.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def load_yaml(text: str) -> Any:
    """YAML -> plain values.

    Raises:
        MiniGPTError: in one line, if it is not YAML, is nested too deeply, names a key twice, or holds references or objects.
    """
    try:
        return yaml.load(text, _Loader)
    except RecursionError as error:
        raise MiniGPTError("it is nested too deeply") from error
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:  # the latter of numbers and dates
        raise MiniGPTError(" ".join(str(error).split())) from error


def recipe_names() -> list[str]:
    """Recipes that come with the package."""
    return sorted(file.name.removesuffix(".yaml") for file in RECIPES.iterdir() if file.name.endswith(".yaml"))


def recipe_text(name: str) -> str:
    """The file of a recipe that comes with the package, comments and all."""
    read_recipe(name)
    return (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")


def recipe_notes(name: str) -> dict[str, str]:
    """What the comment at the head of a recipe says: `what`, `parameters`, `tokens`, `cost`, `result`."""
    first, *rest = recipe_text(name).splitlines()
    notes = dict(found.groups() for line in rest if (found := re.fullmatch(r"# (\w+) {2,}(.+)", line)))
    return {"what": first.removeprefix("# "), **notes}


def resolved(arguments: Settings) -> dict[str, Any]:
    """The settings as a recipe that repeats this training, whatever later defaults are.

    All settings of this package, including those of `TrainingArguments` whose default it changes, and those whose value is
    not transformers' default.
    """
    settings, training = {}, arguments[2]
    for group in arguments:
        values = group.to_dict() if isinstance(group, TrainingArguments) else asdict(group)
        inherited = {each.name: each.default for each in fields(TrainingArguments)} if group is training else {}
        for own in MiniGPTTrainingArguments.__annotations__:
            inherited.pop(own, None)
        for name in [each.name for each in fields(group) if each.init and each.name not in NOT_IN_A_RECIPE]:
            is_derived = name in DERIVED and name not in training.given
            if not is_derived and (name not in inherited or values[name] != inherited[name]):
                settings[name] = copy.deepcopy(values[name])  # YAML writes a shared value as a reference
    if training.max_steps < 0:
        settings["num_train_epochs"] = training.num_train_epochs
    return settings


# Where a run lies and what it runs on is not part of what it does.
NOT_IN_A_RECIPE = {
    *("output_dir", "fresh", "allow_change", "resume_from_checkpoint", "cache_dir", "num_proc", "report_to", "debug"),
    *("dataloader_pin_memory", "hub_token", "push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo"),
    *("hub_always_push", "hub_revision", "local_rank"),
    *("do_eval", "minutes", "size"),  # what they chose is
}
# What is computed from the hardware or from other settings if it is not given.
DERIVED = {
    *("bf16", "dataloader_drop_last", "accelerator_config", "fsdp_config", "activation_checkpointing"),
    *("activation_checkpointing_kwargs", "gradient_checkpointing", "gradient_checkpointing_kwargs"),
    *("metric_for_best_model", "greater_is_better"),
}


def _nearest(name: str, known) -> str:
    near = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ""
