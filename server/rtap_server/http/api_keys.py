"""API keys from a file and from the environment, never from a command line, which other users can read.

Only SHA-256 digests are kept. A key is compared with all of them in constant time. Messages name keys, never show them.
"""

import hashlib
import hmac
import logging
import re
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rtap_core.errors import ConfigError
from rtap_server.http.admission import KeyLimits
from rtap_server.telemetry.logs import announce

KEYS_VARIABLE = "RTAP_API_KEYS"
_VLLM_VARIABLE = "VLLM_API_KEY"
_CHECK_SECONDS = 1.0
_Text = Annotated[str, Field(pattern=r"^[!-~]+$")]  # printable ASCII, which a header carries unchanged
_Count = Annotated[int, Field(ge=1, strict=True)]


@dataclass(frozen=True, slots=True)
class Key:
    """One key. opens_metrics_only: a scraper's key, valid for ``/metrics`` alone."""

    name: str
    digest: bytes
    limits: KeyLimits = field(default_factory=KeyLimits)
    opens_metrics_only: bool = False


class KeyRing:
    """The valid keys. A changed file is read again, checked at most once a second.

    While the file is missing or invalid the previous keys stay valid."""

    def __init__(self, fixed: Sequence[Key], file: Path | None, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises ConfigError for a file that cannot be used."""
        self._fixed, self._file, self._clock = tuple(fixed), file, clock
        self._checked, self._file_version = clock(), None if file is None else _file_version(file)
        self._keys = self._fixed if file is None else self._with(file)

    @property
    def is_empty(self) -> bool:
        """True when the server has no keys. It never changes during a run."""
        return not self._keys

    @property
    def guards_metrics(self) -> bool:
        """True when ``/metrics`` needs a key of scope 'metrics'."""
        return any(key.opens_metrics_only for key in self._keys)

    def find(self, presented: bytes) -> Key | None:
        """The key equal to ``presented``, or None, in constant time."""
        self._reload()
        digest, found = hashlib.sha256(presented).digest(), None
        for key in self._keys:
            if hmac.compare_digest(digest, key.digest):
                found = key
        return found

    def _reload(self) -> None:
        now = self._clock()
        if self._file is None or now - self._checked < _CHECK_SECONDS:
            return
        self._checked = now
        version = _file_version(self._file)
        if version == self._file_version:
            return
        self._file_version = version
        try:
            self._keys = self._with(self._file)
        except ConfigError as error:
            announce(f"{error}; the previous keys stay valid", logging.ERROR)

    def _with(self, file: Path) -> tuple[Key, ...]:
        """The fixed keys, then those of ``file``; a key in both has the limits of the file."""
        keys = (*self._fixed, *_read_file(file))
        if all(key.opens_metrics_only for key in keys):
            raise ConfigError(f"{file} has only keys for /metrics: add a key without a scope")
        return keys


def load_keys(file: Path | None, environ: Mapping[str, str]) -> KeyRing:
    """Keys of the file and of the variables RTAP_API_KEYS (comma separated) and VLLM_API_KEY.

    Raises ConfigError for an invalid file, and for a variable that is set but has no key: the server must not start
    without authentication by mistake."""
    fixed = list[Key]()
    if KEYS_VARIABLE in environ:
        given = [part.strip() for part in environ[KEYS_VARIABLE].split(",") if part.strip()]
        if not given or not all(re.fullmatch(r"[!-~]+", text) for text in given):
            raise ConfigError(
                f"{KEYS_VARIABLE} must be keys of printable ASCII without spaces, separated by commas; "
                "unset it to serve without keys"
            )
        fixed += [Key(f"{KEYS_VARIABLE} {number}", _digest(text)) for number, text in enumerate(given, 1)]
    if environ.get(_VLLM_VARIABLE):
        fixed.append(Key(_VLLM_VARIABLE, _digest(environ[_VLLM_VARIABLE])))
    return KeyRing(fixed, file)


class _Entry(BaseModel):
    """One ``[[keys]]`` table."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    name: str = Field(min_length=1, max_length=64, pattern=r"^[\w .@-]+$")
    key: _Text | None = None
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-fA-F]{64}$")
    requests_per_minute: _Count | None = None
    tokens_per_minute: _Count | None = None
    concurrent: _Count | None = None
    scope: Literal["metrics"] | None = None

    @model_validator(mode="after")
    def _is_one_key(self) -> Self:
        if (self.key is None) is (self.sha256 is None):
            raise ValueError("give either key or sha256")
        return self

    def key_of(self) -> Key:
        """The Key with its digest."""
        digest = _digest(self.key) if self.key is not None else bytes.fromhex(self.sha256 or "")
        limits = KeyLimits(self.requests_per_minute, self.tokens_per_minute, self.concurrent)
        return Key(self.name, digest, limits, opens_metrics_only=self.scope is not None)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    keys: list[_Entry] = Field(min_length=1)


def _read_file(file: Path) -> list[Key]:
    """Keys of a TOML file. Errors name the place and never show contents, which may be keys."""
    try:
        keys = [entry.key_of() for entry in _File.model_validate(tomllib.loads(file.read_text("utf-8"))).keys]
    except OSError as error:
        raise ConfigError(f"cannot read the API keys file {file}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"API keys file {file}: {where}: {first['msg'].removeprefix('Value error, ')}") from None
    except ValueError as error:  # not UTF-8, or not TOML
        line = re.search(r"line \d+", str(error))
        raise ConfigError(f"the API keys file {file} is not valid TOML{f' ({line.group()})' if line else ''}") from None
    if len({key.name for key in keys}) < len(keys) or len({key.digest for key in keys}) < len(keys):
        raise ConfigError(f"API keys file {file}: a name or a key is listed twice")
    return keys


def _file_version(file: Path) -> tuple[int, int, int] | None:
    """(inode, modification time, size) of a file; None while it does not exist."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
