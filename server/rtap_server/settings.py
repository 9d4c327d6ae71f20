"""Every R-TAP knob, once: its name, default, bounds, meaning, command-line flag and ``RTAP_*`` variable.

Precedence: command-line flag, then environment variable, then the checkpoint's own ``rtap`` block, then the default
here. Unknown ``RTAP_*`` names are refused, because pydantic-settings ignores them in silence.
vLLM's own flags are not repeated here.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from rtap_core.errors import ConfigError
from rtap_core.hints import meant
from rtap_core.types import Policy, Select

ENV_PREFIX = "RTAP_"
SECRETS = ("RTAP_API_KEYS",)  # variables without a flag, since others can read a command line
CLIENTS = ("RTAP_URL", "RTAP_API_KEY")  # variables of `rtap ask` and its like, which may be set in the same shell
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Settings(BaseSettings):
    """Validated and frozen; built once at start and passed to whatever needs it."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_prefix=ENV_PREFIX)

    policy: Policy | None = Field(
        default=None, description="who decides to stop; default: confidence when a generator is loaded, else model"
    )
    threshold: Fraction | None = Field(
        default=None, description="confidence that ends a request; default: the generator's own, else 0.5"
    )
    max_cycles: int = Field(default=8, ge=1, description="cycles a request may have unless it says otherwise")
    samples: int = Field(default=8, ge=1, description="samples of policy vote unless the request says otherwise")
    select: Select | None = Field(
        default=None, description="which cycle's answer is returned; default: best under confidence, last under model"
    )
    patience: int | None = Field(
        default=None, ge=1, description="stop after this many cycles without new highest confidence"
    )
    deadline_seconds: float | None = Field(
        default=None,
        gt=0,
        description="answer with the best so far after this long, unless the request says so; default: its limit",
    )
    probe_every: int | None = Field(
        default=None,
        ge=1,
        description="policy confidence: ask for the answer every so many tokens of a thought, and end the thought when "
        "two in a row agree and the confidence clears the threshold; default: never",
    )
    probe_answer_tokens: int = Field(default=64, ge=1, description="a longer answer to a probe counts as none")
    max_cycles_limit: int = Field(default=16, ge=1, description="ceiling for max_cycles of a request")
    samples_limit: int = Field(default=32, ge=1, description="ceiling for samples of a request")
    deadline_seconds_limit: float = Field(default=600.0, gt=0, description="no request is worked on for longer")

    confidence: Literal["auto", "pooling", "remote", "yesno", "logprob", "none"] = Field(
        default="auto", description="where confidence comes from; auto: pooling for a path, remote for a URL, else none"
    )
    confidence_model: str | None = Field(
        default=None,
        description="generator: checkpoint of a one-label classifier, or address of a vLLM /classify server",
    )
    confidence_config: Path | None = Field(
        default=None,
        description="config.json of a remote generator: threshold, calibration, fusion (a local one has its own)",
    )
    confidence_timeout_seconds: float = Field(default=10.0, gt=0, description="a slower score degrades the request")
    speculate_below: int = Field(
        default=4,
        ge=0,
        description="begin the next cycle while the last is being scored, when fewer than this many cycles are being "
        "written; 0: never",
    )
    confidence_engine_args: dict[str, Any] = Field(
        default_factory=dict, description="JSON of vLLM engine arguments for the generator's own engine"
    )
    yesno_question: str = Field(
        default="\nIs this answer right? Answer yes or no:",
        min_length=1,
        description="what confidence=yesno asks the policy after each of its cycles",
    )
    logprob_top_k: int = Field(default=20, ge=1, le=20, description="k of the logprob rule; 1: sampled tokens only")

    trajectory_format: str | None = Field(default=None, description="rtap or think; default: the checkpoint's own")
    oops_lexicon: Path | None = Field(default=None, description="file of self-doubt phrases; default: built in")
    api_keys_file: Path | None = Field(
        default=None,
        description="TOML file of API keys, their limits and scope, read again when it changes; keys without limits "
        "may also be in RTAP_API_KEYS, comma separated",
    )
    max_in_flight_requests: int = Field(
        default=512, ge=1, description="recursive requests answered at a time; more are answered with 503"
    )
    max_in_flight_tokens: int | None = Field(
        default=None,
        ge=1,
        description="tokens that these may write at a time: max_tokens x n, x samples of a vote; default: no limit",
    )
    drain_seconds: float = Field(
        default=30.0,
        ge=0,
        description="after SIGTERM nothing new is taken, and what runs may go on for this long; then it is answered "
        "with the best so far",
    )
    engine_silence_seconds: float = Field(
        default=3.0,
        gt=0,
        description="an engine that has requests and uses no processor for this long counts as dead: the generator is "
        "started again, without the policy the server ends with exit code 1",
    )
    n_limit: int = Field(default=16, ge=1, description="ceiling for n of a request")
    messages_limit: int = Field(
        default=1024, ge=1, description="messages of a chat, items of an input or prompts of a completion at most"
    )
    allow_request_templates: bool = Field(
        default=False, description="take chat_template and chat_template_kwargs from requests"
    )
    max_header_bytes: int = Field(
        default=2**16, ge=1024, description="a longer request line and header fields are answered with 431"
    )
    max_header_fields: int = Field(default=128, ge=16, description="more header fields are answered with 431")
    idempotency_seconds: float = Field(
        default=600.0,
        ge=0,
        description="how long the result of a request with an Idempotency-Key is kept; 0: not at all",
    )
    idempotency_grace_seconds: float = Field(
        default=1.0, ge=0, description="how long a run with an Idempotency-Key goes on when all its clients have left"
    )
    idempotency_results: int = Field(default=1024, ge=1, description="results kept at most; the oldest goes first")
    idempotency_bytes: int = Field(default=64 * 2**20, ge=2**16, description="bytes of results kept at most")
    allow_pickled_weights: bool = Field(
        default=False, description="load .bin and .pt weights, which are pickles, where there are no safetensors"
    )
    log_format: Literal["text", "json"] = Field(
        default="text", description="json: every log line an object, and one line a request"
    )
    max_body_bytes: int = Field(default=8 * 2**20, ge=1024, description="larger request bodies are answered with 413")

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
        if self.confidence_config is not None and kind != "remote":
            raise ValueError(f"confidence_config is of a remote generator, and confidence is '{kind}'")
        return self

    @property
    def confidence_kind(self) -> Literal["pooling", "remote", "yesno", "logprob", "none"]:
        """``confidence`` with ``auto`` decided."""
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
        """Flags, then environment; no dotenv files, which would make two machines differ unseen."""
        return init_settings, env_settings


ALIASES: Mapping[str, str] = {"deadline_seconds": "--deadline"}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the one "R-TAP" group: a flag a field, its help from the field."""
    group = parser.add_argument_group("R-TAP", "recursion; each flag also as an RTAP_* variable (the flag wins)")
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
        raise ConfigError(
            f"unknown settings in the environment: {', '.join(f'{name}{meant(name, known)}' for name in unknown)}; "
            "mend or unset them: `rtap serve --help=R-TAP` lists all"
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
        raise ConfigError(f"--confidence-engine-args is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError("--confidence-engine-args must be a JSON object of engine arguments")
    return value  # pyright: ignore[reportUnknownVariableType]
