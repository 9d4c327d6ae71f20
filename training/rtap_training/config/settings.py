"""Configs of the training commands. Flags override a YAML file, which overrides defaults."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import field, fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast, get_args, get_type_hints

import yaml

from rtap_core.artifact import BUNDLED_MODELS
from rtap_core.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


class SamplerKind(StrEnum):
    """Sampling backend. auto: vLLM if it is installed and a GPU is present, else transformers."""

    AUTO = "auto"
    VLLM = "vllm"
    TRANSFORMERS = "transformers"


BUNDLED = BUNDLED_MODELS
TEMPLATE_KWARGS = 'JSON of variables of the chat template, such as {"enable_thinking": false}, as served'
# Arguments of apply_chat_template that training sets.
_SET_BY_TRAINING = frozenset({
    "add_generation_prompt", "chat_template", "conversation", "messages", "padding", "return_dict", "tokenize", "tools",
})  # fmt: skip


def setting(default: Any, text: str) -> Any:
    """A field with its help text."""
    return field(default=default, metadata={"help": text})


def check_positive(config: "DataclassInstance", *names: str) -> None:
    """Raise ConfigError for a count below 1 in the fields ``names``."""
    for name in names:
        if getattr(config, name) < 1:
            raise ConfigError(f"{name}={getattr(config, name)} must be at least 1")


def json_object(name: str, text: str) -> dict[str, Any]:
    """The JSON object in ``text``, the value of the setting ``name``. Raises ConfigError."""
    try:
        found: Any = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{name}={text!r} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{name}={text!r} must be a JSON object")
    return cast(dict[str, Any], found)


def template_kwargs(text: str) -> dict[str, Any]:
    """Variables of the chat template in the setting ``chat_template_kwargs``. Raises ConfigError."""
    found = json_object("chat_template_kwargs", text)
    if taken := sorted(found.keys() & _SET_BY_TRAINING):
        raise ConfigError(f"chat_template_kwargs={text!r}: {', '.join(taken)} is set by training; leave it out")
    return found


Config = TypeVar("Config", bound="DataclassInstance")


def run_dir(output: Path) -> Path:
    """Folder of logs and resumable states of the run that writes ``output``."""
    return output.with_name(f"{output.name}.run")


def add_flags(parser: argparse.ArgumentParser, config: "type[DataclassInstance]", required: Sequence[str] = ()) -> None:
    """Add one flag per field, and ``--config``. required: fields without a usable default."""
    parser.add_argument("--config", type=Path, help="YAML file with the same names as the flags; flags win")
    types = get_type_hints(config)
    for item in fields(config):
        kind = _plain(types[item.name])
        shape: dict[str, Any] = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        if issubclass(kind, StrEnum):
            shape["choices"] = list(kind)
        shown = "required" if item.name in required else f"default: {item.default}"
        parser.add_argument(
            f"--{item.name.replace('_', '-')}",
            default=argparse.SUPPRESS,
            help=f"{item.metadata['help']} ({shown})".replace("%", "%%"),
            **shape,
        )


def _plain(kind: Any) -> type:
    """The type without ``None``."""
    return next(k for k in get_args(kind) if k is not type(None)) if get_args(kind) else kind


def build_config(config: type[Config], file: Path | None, flags: dict[str, Any]) -> Config:
    """Merge defaults, ``file`` and ``flags``. Raises ConfigError for unknown keys and wrong types."""
    hints = get_type_hints(config)
    types = {item.name: hints[item.name] for item in fields(config)}
    values: dict[str, Any] = _read_yaml(file) if file else {}
    values |= flags
    unknown = sorted(set(values) - set(types))
    if unknown:
        raise ConfigError(f"unknown settings {unknown}; known are {sorted(types)}")
    return config(**{name: _coerce(name, value, types[name]) for name, value in values.items()})


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        loaded: Any = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"{file} must hold `name: value` lines")
    return {str(key): value for key, value in cast(dict[Any, Any], loaded).items()}


def _coerce(name: str, value: Any, declared: Any) -> Any:
    kind = _plain(declared)
    if value is None and kind is not declared:
        return None
    try:
        if isinstance(value, str) and (kind is float or issubclass(kind, Path | StrEnum)):  # YAML reads 1e-6 as text
            return kind(value)
    except ValueError as error:
        raise ConfigError(f"{name}={value!r} must be of type {kind.__name__}") from error
    if kind is float and type(value) is int:
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{name}={value!r} must be of type {kind.__name__}")
    return value
