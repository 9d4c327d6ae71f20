"""Configs of the training commands. Flags override a YAML file, which overrides defaults."""

import argparse
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


def setting(default: Any, text: str) -> Any:
    """A field with its help text."""
    return field(default=default, metadata={"help": text})


def check_positive(config: "DataclassInstance", *names: str) -> None:
    """Raise ConfigError for a count below 1 in the fields ``names``."""
    for name in names:
        if getattr(config, name) < 1:
            raise ConfigError(f"{name}={getattr(config, name)} must be at least 1")


Config = TypeVar("Config", bound="DataclassInstance")


def run_dir(output: Path) -> Path:
    """Folder of logs and resumable states of the run that writes ``output``."""
    return output.with_name(f"{output.name}.run")


def add_flags(parser: argparse.ArgumentParser, config: "type[DataclassInstance]") -> None:
    """Add one flag per field, and ``--config``."""
    parser.add_argument("--config", type=Path, help="YAML file with the same names as the flags; flags win")
    types = get_type_hints(config)
    for item in fields(config):
        kind = _plain(types[item.name])
        shape: dict[str, Any] = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        if issubclass(kind, StrEnum):
            shape["choices"] = list(kind)
        parser.add_argument(
            f"--{item.name.replace('_', '-')}",
            default=argparse.SUPPRESS,
            help=f"{item.metadata['help']} (default: {item.default})".replace("%", "%%"),
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
