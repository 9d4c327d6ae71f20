"""Server settings: each field is a command-line flag and an ``RTAP_*`` variable.

Precedence: flag, environment variable, the checkpoint's ``rtap`` block, the default here. Unknown ``RTAP_*`` variables
are refused, because pydantic-settings ignores them silently.
"""

import argparse
import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from rtap_core.errors import ConfigError
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


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the "R-TAP" group: one flag for each field, with the field's description as help."""
    group = parser.add_argument_group("R-TAP", "each flag is also an RTAP_* variable; the flag wins")
    for name, field in Settings.model_fields.items():
        names = [f"--{name.replace('_', '-')}", *([ALIASES[name]] if name in ALIASES else [])]
        default = "" if field.default in (None, ...) or field.default_factory else f" [{field.default}]"
        switch: dict[str, Any] = {"nargs": "?", "const": "true"} if field.annotation is bool else {}
        group.add_argument(*names, dest=f"rtap_{name}", metavar="VALUE", help=f"{field.description}{default}", **switch)


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
            "fix or unset them: `rtap serve --help=R-TAP` lists all"
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
        where = f"--{name.replace('_', '-')} (or {ENV_PREFIX}{name.upper()})={first['input']!r}: " if name else ""
        raise ConfigError(where + first["msg"].removeprefix("Value error, ")) from error


def _json_object(text: str) -> dict[str, Any]:
    try:
        value: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--confidence-engine-args is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError("--confidence-engine-args must be a JSON object of engine arguments")
    return value  # pyright: ignore[reportUnknownVariableType]


def closest_match(word: str, known: Iterable[str]) -> str:
    """`` (did you mean X?)`` for the known word most like ``word``; empty when none is."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
