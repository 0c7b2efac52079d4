"""Parse recipes, flags and keywords into settings, and convert settings to a recipe.

A recipe is a YAML file whose keys are names of settings. Flags and keywords override it. `recipes/` contains the recipes of
the package.
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
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from transformers import HfArgumentParser, TrainingArguments

from ..errors import MiniGPTError
from .arguments import (
    AUTO,
    GROUPS,
    MiniGPTTrainingArguments,
    Settings,
    log_on_main_process,
    parse_positional_heads,
    setting_types,
)
from .combinations import reject_contradictions, report_settings_without_effect, settings_of_base
from .positional_heads import fitting_positional_heads
from .scaling import heads_for

MAX_RECIPE_BYTES = 1 << 16
OPTIONAL_BASIS = {"minutes", "size", "init_from"}  # settings that determine the default recipe unless they are None
RECIPES = files("minigpt_hf") / "training" / "recipes"


def parse_arguments(argv: Sequence[str], recipe: str | None = None, **overrides: Any) -> Settings:
    """Combine a recipe with the flags and keywords that override it.

    Args:
        argv: Flags, as on the command line.
        recipe: Name or YAML file. Default: none with `minutes` or `size`, `chat` with `chat`, `lora` with `lora_rank`,
            `finetune` with `init_from`, `auto` with `data`, otherwise `demo`.
        overrides: Settings as keywords, by name.

    Raises:
        MiniGPTError: for an unknown recipe, setting or flag, with similar names; or an invalid value.
    """
    flags = [flag.partition("=")[0].lstrip("-").replace("-", "_") for flag in argv if flag.startswith("--")]
    # HfArgumentParser adds --no_X for each X whose default is True.
    flags = [name if name in setting_types() else name.removeprefix("no_") for name in flags]
    given = {*flags, *overrides}
    for value in (recipe, *argv, *overrides.values()):
        # The name of an existing file may consist of any bytes.
        if isinstance(value, str) and not _is_unicode(value) and not Path(value).exists():
            raise MiniGPTError(
                f"argument {value!r}: not valid text in the encoding of this system, {sys.getfilesystemencoding()}; use "
                "UTF-8, and set PYTHONUTF8=1"
            )
    overrides = {name: os.fspath(each) if isinstance(each, os.PathLike) else each for name, each in overrides.items()}
    overrides = _checked(overrides)
    if recipe is not None and not recipe.strip():
        raise MiniGPTError("recipe is empty: give a name or a YAML file, or omit it")
    if recipe is None:
        # None is the default of these settings, which programs may pass on; `auto` itself sets `size`.
        overrides = {name: each for name, each in overrides.items() if each is not None or name not in OPTIONAL_BASIS}
        given = {*flags, *overrides}
        preliminary = argument_parser(prog="minigpt train")
        preliminary.set_defaults(**overrides)
        values_of_flags = vars(preliminary.parse_known_args([*argv])[0])
        recipe = _default_recipe({name for name in given if values_of_flags.get(name) not in (None, False, 0)})
    recipe_values = read_recipe(recipe) if recipe else {}
    values = {"output_dir": f"runs/{Path(recipe or 'auto').stem}", **recipe_values, **overrides}
    for layer in (given, recipe_values):  # num_train_epochs overrides the max_steps of a layer of lower precedence
        if "max_steps" in layer:
            break
        if "num_train_epochs" in layer:
            values["max_steps"] = -1
            break
    parser = argument_parser(prog="minigpt train")
    of_file = recipe_values if recipe and _is_file(recipe) else {}
    chosen = {name for name, value in of_file.items() if value != parser.get_default(name)}
    parser.set_defaults(**values)
    try:
        data, model, training, unknown = parser.parse_args_into_dataclasses(
            list(argv), return_remaining_strings=True, look_for_args_file=False
        )
    except MiniGPTError:
        raise
    except (ValueError, TypeError, ImportError) as error:  # raised by `TrainingArguments`
        raise MiniGPTError(str(error)) from error
    if unknown:
        raise MiniGPTError(
            f"unknown argument {unknown[0]}{_suggestion(unknown[0].lstrip('-').replace('-', '_'), setting_types())}"
        )
    settings = Settings(data, model, training).replace(
        given=frozenset(given | values.keys()), given_in_command=frozenset(given), written=frozenset(given | chosen)
    )
    reject_contradictions(settings, recipe, recipe_values)
    if model.init_from:
        settings = settings.replace(**settings_of_base(model.init_from))
    settings = _with_settings_of_prepared_text(settings, given)
    report_settings_without_effect(settings, recipe_values)
    if settings.data.validation_fraction == 0:
        settings = settings.replace(
            eval_strategy="no", eval_on_start=False, do_eval=False, load_best_model_at_end=False
        )
    if settings.data.data != recipe_values.get("data", settings.data.data):
        settings = _without_description_of_another_text(settings, recipe_values, given)
    if not model.init_from and training.size != AUTO:
        settings = _with_fitting_heads(settings, given)
        settings = _with_fitting_positional_heads(settings, given)
    return settings


def _with_settings_of_prepared_text(settings: Settings, given: set[str]) -> Settings:
    """Replace the settings of a recipe by those that a prepared text was prepared with.

    Raises:
        MiniGPTError: if a flag or keyword differs from them.
    """
    from ..data.corpus import public_name  # imports `datasets`, which `--help` does not require
    from ..data.prepared import find_prepared, prepared_settings

    data = settings.data
    if (folder := find_prepared(data.data, data.cache_dir)) is None:
        return settings
    stored = prepared_settings(folder)
    if stored["tokenizer"] != "bpe" and "vocab_size" in given:
        del stored["vocab_size"]  # no effect with other tokenizers; reported by `AutoConfigurator`
    requested = {name: vars(data)[name] for name in stored if name in given}
    if "tokenizer" in requested:
        requested["tokenizer"] = public_name(data.tokenizer)
    if different := [name for name, value in requested.items() if value != stored[name]]:
        described = ", ".join(f"{name} {requested[name]}" for name in different)
        prepared_with = ", ".join(f"{name} {stored[name]}" for name in different)
        raise MiniGPTError(
            f"{described}: {data.data} was prepared with {prepared_with}; omit the setting, or prepare the text again with "
            "`minigpt tokenize`"
        )
    return settings.replace(**stored)


def _is_unicode(text: str) -> bool:
    """Whether a text can be encoded in UTF-8; undecodable bytes of an argument become lone surrogates, which cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _default_recipe(given: set[str]) -> str | None:
    """The recipe for the settings that are given with a value other than none, false or 0."""
    if given & {"minutes", "size"}:
        return None
    for setting, recipe in (("chat", "chat"), ("lora_rank", "lora"), ("init_from", "finetune"), ("data", "auto")):
        if setting in given:
            return recipe
    return "demo"


def _without_description_of_another_text(settings: Settings, recipe: dict[str, Any], given: set[str]) -> Settings:
    """Drop language, license and prompt of a recipe, because they describe the text of the recipe and not the given one."""
    dropped = {name for name in ("language", "license", "sample_prompt") if name in recipe and name not in given}
    if not dropped:
        return settings
    described = ", ".join(f"{name} {recipe[name]!r}" for name in sorted(dropped))
    log_on_main_process(
        settings.training,
        f"data {settings.data.data} replaces the text of the recipe, {recipe['data']}; ignored from the recipe: {described}",
    )
    empty: dict[str, Any] = {"language": [], "license": None, "sample_prompt": None}
    return settings.replace(**{name: empty[name] for name in dropped}, given=settings.training.given - dropped)


def _with_fitting_heads(settings: Settings, given: set[str]) -> Settings:
    """Choose the number of heads if a width is given without it, and the number of the recipe does not divide the width."""
    model = settings.model
    heads, width = model.num_attention_heads, model.hidden_size
    if "hidden_size" not in given or given & {"num_attention_heads", "head_dim"} or model.head_dim or heads < 1:
        return settings
    fits = width % heads == 0 and width // heads % 2 == 0
    if fits or width < 1 or (chosen := heads_for(width, model.num_key_value_heads or 1)) is None:
        return settings  # if no number fits, `build_config` rejects the architecture
    log_on_main_process(
        settings.training,
        f"num_attention_heads {chosen}: hidden_size {width} does not divide into {heads} heads of even dimension; "
        f"head_dim is {width // chosen}",
    )
    return settings.replace(num_attention_heads=chosen)


def _with_fitting_positional_heads(settings: Settings, given: set[str]) -> Settings:
    """Drop the positional heads of a recipe that do not fit other settings."""
    data, model, training = settings
    if "positional_heads" in given:
        return settings  # `build_config` rejects those that do not fit
    recipe = parse_positional_heads(model.positional_heads)
    fitting = fitting_positional_heads(recipe, model, data.block_size)
    if fitting == recipe:
        return settings
    window = f" and sliding_window {model.sliding_window}" if model.use_sliding_window and model.sliding_window else ""
    log_on_main_process(
        training,
        f"positional_heads {fitting}: those of the recipe that fit {model.num_hidden_layers} layers of "
        f"{model.num_key_value_heads or model.num_attention_heads} key heads and block_size {data.block_size}{window}",
    )
    return settings.replace(positional_heads=fitting)


class _Parser(HfArgumentParser):
    def error(self, message: str):
        raise MiniGPTError(message)


def argument_parser(**kwargs) -> HfArgumentParser:
    """Create a parser of all settings. It rejects abbreviations, and raises `MiniGPTError` for invalid arguments."""
    return _Parser(GROUPS, allow_abbrev=False, **kwargs)


# Settings that the recipe `auto` leaves to `AutoConfigurator`.
CHOSEN_FROM_THE_TEXT = (
    *("vocab_size", "block_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "residual_dropout"),
    *("rope_theta", "positional_heads"),
    *("per_device_train_batch_size", "max_steps", "warmup_steps", "learning_rate", "weight_decay", "logging_steps"),
    *("eval_steps", "sample_prompt"),
)


def effective_defaults() -> dict[str, tuple[str, str]]:
    """Return {setting: (default without flags, default with `--data` only)}, i.e. of the recipes `demo` and `auto`.

    Settings that are in neither recipe are omitted; they have the defaults of their dataclasses.
    """
    demo, auto = read_recipe("demo"), read_recipe("auto")
    defaults = {}
    for each in (each for group in GROUPS for each in fields(group) if each.init and each.name != "data"):
        if each.name not in {*demo, *auto, *CHOSEN_FROM_THE_TEXT}:
            continue
        default = each.default if each.default is not MISSING else None
        with_data = _shown(auto.get(each.name, default))
        if each.name in CHOSEN_FROM_THE_TEXT:
            with_data = "chosen from the text"
        defaults[each.name] = (_shown(demo.get(each.name, default)), with_data)
    return defaults


def _shown(value: Any) -> str:
    """A default value as shown in the help; lists as they are given on the command line."""
    if isinstance(value, list) and value and isinstance(value[0], list):
        return " ".join(",".join(map(str, each)) for each in value)
    return "none" if value in (None, "", []) else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _is_file(recipe: str) -> bool:
    """Whether `recipe` is a YAML file, not the name of a recipe of the package."""
    return recipe.endswith((".yaml", ".yml"))


def read_recipe(name: str) -> dict[str, Any]:
    """Read the settings of a recipe of the package, or of a YAML file.

    Raises:
        MiniGPTError: if the recipe does not exist, is not a YAML mapping, or contains an unknown setting or an invalid value.
    """
    source: Traversable
    if _is_file(name):
        source = Path(name)
        if not source.is_file():
            raise MiniGPTError(f"recipe {name}: no such file")
        if source.stat().st_size > MAX_RECIPE_BYTES:
            raise MiniGPTError(f"recipe {name}: larger than {MAX_RECIPE_BYTES:,} bytes, the maximum size of a recipe")
    else:
        source = RECIPES / f"{name}.yaml"
        if not source.is_file():
            raise MiniGPTError(
                f"unknown recipe {name!r}{_suggestion(name, recipe_names())}; available: {', '.join(recipe_names())}"
            )
    try:
        settings = load_yaml(source.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError included
        raise MiniGPTError(f"recipe {name}: invalid YAML: {' '.join(str(error).split())}") from error
    if settings is None or settings == {}:  # e.g. of a file whose writing failed
        raise MiniGPTError(f"recipe {name}: is empty: expected lines of `key: value`")
    if not isinstance(settings, dict):
        raise MiniGPTError(f"recipe {name}: expected lines of `key: value`, found a {type(settings).__name__}")
    return _checked(settings, f"recipe {name}: ")


def _checked(settings: dict[str, Any], origin: str = "") -> dict[str, Any]:
    """Check names and types of settings. Strings are converted to floats where a float is expected.

    Args:
        settings: Values by name.
        origin: Prefix of error messages.

    Raises:
        MiniGPTError: for an unknown name or a value of a wrong type.
    """
    known, settings = setting_types(), dict(settings)
    optional = {each.name for group in GROUPS for each in fields(group) if each.default is None}
    choices = {name: get_args(kind) for name, kind in known.items() if get_origin(kind) is Literal}
    choices |= {each.name: each.metadata["choices"] for each in fields(TrainingArguments) if "choices" in each.metadata}
    for key, value in settings.items():
        if key not in known:
            raise MiniGPTError(f"{origin}unknown setting {key!r}{_suggestion(str(key), known)}")
        if value is False and key.endswith("_strategy"):
            value = settings[key] = "no"  # YAML 1.1 reads `no` as false
        if known[key] == list[str] and isinstance(value, str):
            value = settings[key] = [value]
        if key == "size" and isinstance(value, int | float) and not isinstance(value, bool):
            value = settings[key] = str(value)
        kind = next((kind for kind in (bool, int, float, str) if known[key] in (kind, kind | None)), None)
        allowed = {bool: bool | str, int: int | float | str, float: int | float | str, str: str}
        if kind and value is None and key not in optional and not isinstance(None, known[key]):
            raise MiniGPTError(f"{origin}{key} is None: expected {kind.__name__}")
        if kind and value is not None:
            is_valid = isinstance(value, allowed[kind]) and (kind is bool or not isinstance(value, bool))
            if not is_valid:
                raise MiniGPTError(f"{origin}{key} is {reprlib.repr(value)}: expected {kind.__name__}")
        is_unset = value is None and key in optional
        if (allowed_values := choices.get(key)) and value not in allowed_values and not is_unset:
            raise MiniGPTError(
                f"{origin}{key} is {reprlib.repr(value)}: expected {', '.join(map(str, allowed_values))}"
            )
        if kind is float and isinstance(value, str):  # YAML 1.1 reads 4e-3 as a string, 4.0e-3 as a float
            try:
                value = settings[key] = float(value)
            except ValueError as error:
                raise MiniGPTError(f"{origin}{key} is {reprlib.repr(value)}: expected a number") from error
        if isinstance(value, float):
            if not math.isfinite(value):
                raise MiniGPTError(f"{origin}{key} is {value}: expected a finite number")
            if kind is int:
                raise MiniGPTError(f"{origin}{key} is {value}: expected an integer")
        if isinstance(value, int) and abs(value) >= 1 << 63:
            raise MiniGPTError(
                f"{origin}{key} is an integer of {value.bit_length()} bits: at most 63 bits are supported"
            )
    return settings


class _Loader(yaml.SafeLoader):
    """Loads plain values only. Rejects duplicate keys, and aliases, which can expand exponentially."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases (*) are not supported", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for each, _ in node.value:
            key = self.construct_object(each, deep=True)
            if key in seen:
                problem = f"duplicate key {reprlib.repr(key)}"
                raise yaml.constructor.ConstructorError(None, None, problem, each.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def load_yaml(text: str) -> Any:
    """Parse YAML into plain values.

    Raises:
        MiniGPTError: for invalid YAML, excessive nesting, duplicate keys, aliases and object tags.
    """
    try:
        return yaml.load(text, _Loader)
    except RecursionError as error:
        raise MiniGPTError("nested too deeply") from error
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:  # the last three: numbers and dates
        raise MiniGPTError(" ".join(str(error).split())) from error


def recipe_names() -> list[str]:
    """Names of the recipes of the package."""
    return sorted(file.name.removesuffix(".yaml") for file in RECIPES.iterdir() if file.name.endswith(".yaml"))


def recipe_text(name: str) -> str:
    """Return the file of a recipe of the package, including its comments."""
    read_recipe(name)
    return (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")


def recipe_notes(name: str) -> dict[str, str]:
    """Parse the header comment of a recipe: `what`, `parameters`, `tokens`, `cost`, `result`."""
    first, *rest = recipe_text(name).splitlines()
    notes = {found[1]: found[2] for line in rest if (found := re.fullmatch(r"# (\w+) {2,}(.+)", line))}
    return {"what": first.removeprefix("# "), **notes}


def resolved(arguments: Settings) -> dict[str, Any]:
    """Convert settings to a recipe that reproduces the run even if defaults change later.

    It contains all settings that this package defines or whose default it changes, and the other settings of
    `TrainingArguments` whose value is not the default.
    """
    settings, training = {}, arguments[2]
    for group in arguments:
        values = group.to_dict() if isinstance(group, TrainingArguments) else asdict(group)
        inherited = {each.name: each.default for each in fields(TrainingArguments)} if group is training else {}
        for own in MiniGPTTrainingArguments.__annotations__:
            inherited.pop(own, None)
        for name in [each.name for each in fields(group) if each.init and each.name not in EXCLUDED_FROM_RECIPE]:
            is_derived = name in DERIVED and name not in training.given
            if not is_derived and (name not in inherited or values[name] != inherited[name]):
                settings[name] = copy.deepcopy(values[name])  # YAML would write shared objects as aliases
    if training.max_steps < 0:
        settings["num_train_epochs"] = training.num_train_epochs
    return settings


# Settings of the location and environment of a run, which do not belong in its recipe.
EXCLUDED_FROM_RECIPE = {
    *("output_dir", "fresh", "allow_change", "resume_from_checkpoint", "cache_dir", "num_proc", "report_to", "debug"),
    *("dataloader_pin_memory", "hub_token", "push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo"),
    *("hub_always_push", "hub_revision", "local_rank"),
    *("do_eval", "minutes", "size"),  # the settings that they determine are included instead
}
# Settings computed from the hardware or from other settings unless given.
DERIVED = {
    *("bf16", "dataloader_drop_last", "accelerator_config", "fsdp_config", "activation_checkpointing"),
    *("activation_checkpointing_kwargs", "gradient_checkpointing", "gradient_checkpointing_kwargs"),
    *("metric_for_best_model", "greater_is_better"),
}


def _suggestion(name: str, known) -> str:
    similar = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(similar)}?" if similar else ""
