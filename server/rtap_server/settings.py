"""Server settings: each field is a command-line flag and an ``RTAP_*`` variable.

Precedence: flag, environment variable, the checkpoint's ``rtap`` block, the default here. Unknown ``RTAP_*`` variables
are refused, because pydantic-settings ignores them silently.
"""

import argparse
import json
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin

from pydantic import Field, TypeAdapter, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from rtap_core.errors import ConfigError, closest_match
from rtap_core.types import Continuation, Policy, Select

ENV_PREFIX = "RTAP_"
SECRETS = ("RTAP_API_KEYS",)  # no flag: other users can read a command line
CLIENTS = ("RTAP_URL", "RTAP_API_KEY")  # variables of the client commands
_IDEMPOTENCY = "Idempotency-Key is not supported; a retry is a new request"
_PROBES = "a thought runs to its end: ending it at probes that agree saved too little"
_HEADERS = "use vLLM's --h11-max-incomplete-event-size, or limit headers in a proxy"
# Flags of earlier versions, each with what to do instead.
REMOVED: Mapping[str, str] = {
    "--speculate-below": "the next cycle always starts after the score of the previous one",
    "--logprob-top-k": "confidence=logprob reads the sampled tokens; calibrate it with `rtap calibrate`",
    "--probe-every": _PROBES,
    "--probe-answer-tokens": _PROBES,
    "--max-header-bytes": _HEADERS,
    "--max-header-fields": _HEADERS,
    "--idempotency-seconds": _IDEMPOTENCY,
    "--idempotency-grace-seconds": _IDEMPOTENCY,
    "--idempotency-results": _IDEMPOTENCY,
    "--idempotency-bytes": _IDEMPOTENCY,
}
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Settings(BaseSettings):
    """Validated and frozen; built once at start."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_prefix=ENV_PREFIX)

    policy: Policy | None = Field(
        default=None, description="stopping policy; default: confidence with a generator, else model"
    )
    threshold: Fraction | None = Field(
        default=None,
        description="confidence that ends a request; default: the generator's own, else 0.5; under vote 0.85, "
        "with calibrated confidences 0.95",
    )
    max_cycles: int = Field(default=8, ge=1, description="default for max_cycles of a request")
    samples: int = Field(default=8, ge=1, description="default for samples of a request under policy vote")
    select: Select | None = Field(
        default=None, description="which cycle's answer is returned; default: best under confidence, last under model"
    )
    recursion: Continuation | None = Field(
        default=None,
        description="a further cycle continues the trajectory or is a fresh attempt; default: the checkpoint's own, "
        "continue for format rtap, else fresh",
    )
    patience: int | None = Field(
        default=None, ge=1, description="stop after this many cycles without a new highest confidence"
    )
    deadline_seconds: float | None = Field(
        default=None,
        gt=0,
        description="default deadline of a request: return the best answer so far; default: the limit",
    )
    max_cycles_limit: int = Field(default=16, ge=1, description="ceiling for max_cycles of a request")
    samples_limit: int = Field(default=32, ge=1, description="ceiling for samples of a request")
    deadline_seconds_limit: float = Field(default=600.0, gt=0, description="ceiling for deadline_seconds of a request")

    confidence: Literal["auto", "pooling", "remote", "yesno", "logprob", "none"] = Field(
        default="auto", description="source of confidence; auto: pooling for a path, remote for a URL, else none"
    )
    confidence_model: str | None = Field(
        default=None,
        description="generator: checkpoint of a classifier or reward model, folder of an adapter of `rtap train "
        "generator`, or address of a vLLM /classify server",
    )
    confidence_backbone: str | None = Field(
        default=None, description="model that a generator's adapter is merged into; default: the one that it names"
    )
    confidence_config: Path | None = Field(
        default=None,
        description="JSON file of `rtap calibrate`, or config.json of a remote generator: threshold and calibration, "
        "in place of a local generator's own",
    )
    confidence_input: Literal["auto", "token_ids", "chat"] = Field(
        default="auto",
        description="what a generator reads: the policy's token ids, or a chat in its own template; auto: token_ids "
        "when the tokenizers are the same",
    )
    confidence_timeout_seconds: float = Field(
        default=10.0, gt=0, description="on timeout the request continues without the generator"
    )
    confidence_engine_args: dict[str, Any] = Field(
        default_factory=dict, description="JSON of vLLM engine arguments for the generator's own engine"
    )
    yesno_question: str = Field(
        default="\nIs this answer right? Answer yes or no:",
        min_length=1,
        description="question that confidence=yesno appends to each cycle",
    )

    trajectory_format: str | None = Field(
        default=None,
        description="rtap, think or text; default: the checkpoint's own, else by <think> in template or vocabulary",
    )
    cycle_open: str | None = Field(
        default=None,
        description="text after which the model writes a further cycle when cycles continue; default: the checkpoint's "
        "own, else the format's",
    )
    oops_lexicon: Path | None = Field(default=None, description="file of self-doubt phrases; default: built in")
    api_keys_file: Path | None = Field(
        default=None,
        description="TOML file of API keys with limits and scope, reloaded when it changes; RTAP_API_KEYS holds keys "
        "without limits, separated by commas",
    )
    max_in_flight_requests: int = Field(
        default=512,
        ge=1,
        description="requests in flight, one for each prompt, choice and vote sample; more are answered with 503",
    )
    max_in_flight_tokens: int = Field(
        default=2**21,
        ge=1,
        description="tokens that requests in flight may generate: max_tokens (if none is given, 4096) for each prompt, "
        "choice and sample",
    )
    trajectories_limit: int = Field(default=128, ge=1, description="ceiling for prompts x n x samples of a request")
    drain_seconds: float = Field(
        default=30.0,
        ge=0,
        description="after SIGTERM running requests may finish for this long, then return the best answer so far",
    )
    engine_silence_seconds: float = Field(
        default=60.0,
        gt=0,
        description="an engine with unfinished requests and no output for this long is killed: the generator restarts, "
        "without the policy the server exits with code 1; a prefill has no output, so keep it above the longest one",
    )
    n_limit: int = Field(default=16, ge=1, description="ceiling for n of a request")
    messages_limit: int = Field(
        default=1024, ge=1, description="ceiling for messages of a chat, items of an input, prompts of a completion"
    )
    allow_request_templates: bool = Field(
        default=False, description="accept chat_template and any chat_template_kwargs in requests; switches always pass"
    )
    allow_pickled_weights: bool = Field(
        default=False, description="load pickled weights (.bin, .pt) when there are no safetensors"
    )
    log_format: Literal["text", "json"] = Field(
        default="text", description="json: each log line is an object, one for each request"
    )
    verbose: bool = Field(default=False, description="show warnings of vLLM and other libraries; errors always show")
    max_body_bytes: int = Field(default=8 * 2**20, ge=1024, description="larger request bodies are answered with 413")
    body_timeout_seconds: float = Field(
        default=30.0, gt=0, description="a request body that is not complete after this long is answered with 408"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for name in ("max_cycles", "samples", "deadline_seconds"):
            value, limit = getattr(self, name), getattr(self, f"{name}_limit")
            if value is not None and value > limit:
                raise ValueError(f"{name}={value} is above {name}_limit={limit}; raise the limit or lower {name}")
        kind, model = self.confidence_kind, self.confidence_model
        if self.policy is Policy.CONFIDENCE and kind == "none":
            raise ValueError("policy=confidence needs a generator; name one with --confidence-model")
        is_url = bool(model) and str(model).startswith(("http://", "https://"))
        if kind in ("pooling", "remote") and not model:
            raise ValueError(f"confidence={kind} needs confidence_model")
        if kind == "remote" and not is_url:
            raise ValueError(f"confidence=remote needs a http(s) address as confidence_model, not {model!r}")
        if kind == "pooling" and is_url:
            raise ValueError("confidence=pooling needs a checkpoint as confidence_model, not an address")
        if self.confidence_input != "auto" and kind not in ("pooling", "remote"):
            raise ValueError(f"confidence_input needs confidence=pooling or remote, not {kind}")
        if self.confidence_config is not None and kind == "none":
            raise ValueError("confidence_config needs a confidence: name its --confidence or --confidence-model")
        return self

    @property
    def confidence_kind(self) -> Literal["pooling", "remote", "yesno", "logprob", "none"]:
        """``confidence`` with ``auto`` resolved."""
        if self.confidence != "auto":
            return self.confidence
        if not self.confidence_model:
            return "none"
        return "remote" if self.confidence_model.startswith(("http://", "https://")) else "pooling"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - the signature is pydantic-settings'
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then environment; no dotenv files."""
        return init_settings, env_settings


ALIASES: Mapping[str, str] = {"deadline_seconds": "--deadline"}
# Groups of `rtap serve --help`: title -> (description, settings).
GROUPS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "stopping": (
        "when a request ends; a request's rtap object overrides it",
        ("policy", "threshold", "max_cycles", "samples", "select", "recursion", "patience", "deadline_seconds",
         "trajectory_format", "cycle_open"),
    ),
    "confidence": (
        "what scores an answer",
        ("confidence", "confidence_model", "confidence_backbone", "confidence_config", "confidence_input",
         "confidence_timeout_seconds", "confidence_engine_args", "yesno_question"),
    ),
    "limits": (
        "ceilings for requests",
        ("max_cycles_limit", "samples_limit", "deadline_seconds_limit", "trajectories_limit", "n_limit",
         "messages_limit", "max_in_flight_requests", "max_in_flight_tokens", "max_body_bytes", "body_timeout_seconds",
         "allow_request_templates"),
    ),
    "operations": (
        "keys, logs, start and stop",
        ("api_keys_file", "log_format", "verbose", "drain_seconds", "engine_silence_seconds", "allow_pickled_weights",
         "oops_lexicon"),
    ),
}  # fmt: skip


def flag_of(name: str) -> str:
    """Flag of a setting."""
    return f"--{name.replace('_', '-')}"


def add_flags(parser: argparse.ArgumentParser, groups: Iterable[str] = tuple(GROUPS)) -> None:
    """Add a flag for each setting of the groups, with the field's description as help."""
    for title in groups:
        description, names = GROUPS[title]
        group = parser.add_argument_group(title, f"{description}; each flag is also an RTAP_* variable, the flag wins")
        for name in names:
            field = Settings.model_fields[name]
            flags = [flag_of(name), *([ALIASES[name]] if name in ALIASES else [])]
            switch: dict[str, Any] = {"nargs": "?", "const": "true"} if field.annotation is bool else {}
            values = _choices(field.annotation)
            metavar = f"{{{','.join(values)}}}" if values else "VALUE"
            text = f"{field.description}{_shown_default(field)}".replace("%", "%%")
            group.add_argument(*flags, dest=f"rtap_{name}", metavar=metavar, help=text, **switch)


def _choices(annotation: Any) -> list[str]:
    """Allowed values of a Literal or an enumeration, also of an optional one."""
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return [str(member.value) for member in annotation]
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    return [value for part in get_args(annotation) for value in _choices(part)]


def _shown_default(field: FieldInfo) -> str:
    """Default in brackets, unless the description names it."""
    if "default: " in (field.description or ""):
        return ""
    value: Any = field.get_default(call_default_factory=True)
    shown = {None: "none", True: "on", False: "off"}.get(value, value) if not isinstance(value, dict) else "{}"
    return f" [{str(shown).strip()}]"


def check_value(name: str, text: str) -> None:
    """Raise ConfigError when ``text`` is no value of the setting ``name``."""
    if name == "confidence_engine_args":
        _json_object(text)
        return
    field = Settings.model_fields[name]
    kind: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    try:
        adapter.validate_python(text)
    except ValidationError as error:
        raise ConfigError(_sentence(name, text, error)) from error


def _sentence(name: str, value: object, error: ValidationError) -> str:
    message = error.errors()[0]["msg"].removeprefix("Value error, ")
    return f"{flag_of(name)} (or {ENV_PREFIX}{name.upper()})={value!r}: {message}"


def load_settings(args: Mapping[str, Any], environ: Mapping[str, str]) -> Settings:
    """Settings from parsed flags (``rtap_*`` names, None when not given) and the environment.

    Raises ConfigError with the flag, the value and the rule."""
    known = [f"{ENV_PREFIX}{name.upper()}" for name in Settings.model_fields]
    unknown = sorted(k for k in environ if k.startswith(ENV_PREFIX) and k not in (*known, *SECRETS, *CLIENTS))
    if unknown:
        removed = {f"{ENV_PREFIX}{flag[2:].replace('-', '_').upper()}": reason for flag, reason in REMOVED.items()}
        for name in filter(removed.get, unknown):
            raise ConfigError(f"{name} was removed: {removed[name]}")
        raise ConfigError(
            f"unknown variables: {', '.join(f'{name}{closest_match(name, known)}' for name in unknown)}; "
            "fix or unset them: `rtap serve --help` lists all"
        )
    given = {name: args[f"rtap_{name}"] for name in Settings.model_fields if args.get(f"rtap_{name}") is not None}
    if "confidence_engine_args" in given:
        given["confidence_engine_args"] = _json_object(given["confidence_engine_args"])
    try:
        return Settings(**given)
    except SettingsError as error:
        raise ConfigError(f"{error} (is it valid JSON?)") from error
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        message = _sentence(name, first["input"], error) if name else first["msg"].removeprefix("Value error, ")
        raise ConfigError(message) from error


def _json_object(text: str) -> dict[str, Any]:
    try:
        value: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--confidence-engine-args is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError("--confidence-engine-args must be a JSON object of engine arguments")
    return value  # pyright: ignore[reportUnknownVariableType]
