"""Parsing of forwarded requests and replies: conversation keys, token costs, server-sent events, merged metrics.

Pure: no Ray, no sockets. Ray's consistent hashing over ``conversation_key`` chooses the replica.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec

from rtap_core.errors import InvalidRequest
from rtap_server.http.body_limits import parse_json

_SESSION_HEADER = b"x-session-id"  # Ray Serve's name for it
_END = b"\n\n"
_DATA = b"data:"


@dataclass(frozen=True, slots=True)
class ForwardedRequest:
    """One complete HTTP request; header names in lower case."""

    method: str
    path: str
    query: bytes = b""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class ResponseStart:
    """Status and headers of a reply."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...] = ()

    @property
    def is_stream(self) -> bool:
        """True when server-sent events follow."""
        return dict(self.headers).get(b"content-type", b"").startswith(b"text/event-stream")


def conversation_key(request: ForwardedRequest) -> str:
    """The same for all turns of a conversation, so that they reach the replica with its prefix cache.

    Empty when any replica will do. The header ``x-session-id`` comes first, then the field ``prompt_cache_key``, then
    the beginning of the conversation: all up to the user's first message, or the whole prompt. The API key is part of
    it, because each key has its own cache."""
    headers = dict(request.headers)
    session = headers.get(_SESSION_HEADER)
    beginning = session or (_beginning(request.body) if request.method == "POST" else None)
    if not beginning:
        return ""
    key = headers.get(b"authorization", headers.get(b"x-api-key", b""))
    return hashlib.sha256(key + b"\0" + beginning).hexdigest()[:32]


def _beginning(body: bytes) -> bytes | None:
    """The part of a request body that a later turn repeats."""
    try:
        fields = parse_json(body)  # bounded: the gateway has one event loop for all clients
    except InvalidRequest:
        return None  # the replica answers with the error
    named = fields.get("prompt_cache_key")
    if isinstance(named, str) and named:
        return named.encode()
    turns: Any = fields.get("messages", fields.get("input", fields.get("prompt")))
    if turns is None:
        return None
    if isinstance(turns, list):
        turns = list(_to_first_user_message(cast(list[Any], turns)))
    return msgspec.json.encode([fields.get("model"), fields.get("system"), fields.get("instructions"), turns])


def _to_first_user_message(turns: list[Any]) -> Iterable[Any]:
    """Messages up to the user's first one; every element of a list of prompts or token ids."""
    for turn in turns:
        yield turn
        if isinstance(turn, dict) and cast(dict[str, Any], turn).get("role") == "user":
            return


def response_tokens(body: bytes) -> int:
    """Tokens that the replica counted for a reply: sampled, and read outside the prefix cache or for a score."""
    try:
        reply: Any = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return 0
    if not isinstance(reply, dict):
        return 0
    fields = cast(dict[str, Any], reply)
    return int(fields["confidence_tokens"]) if fields.get("object") == "rtap.score" else _trajectory_tokens(fields) or 0


@dataclass(slots=True)
class EventReader:
    """Split a stream into complete events. tokens: cost that the stream has reported so far."""

    tokens: int = 0
    _held: bytes = field(init=False, default=b"")

    def feed(self, data: bytes) -> bytes:
        """Events completed by ``data``. A partial event is held back: the client must not see half of one before an
        error."""
        data = self._held + data
        end = data.rfind(_END) + len(_END) if _END in data else 0
        self._held = data[end:]
        for event in data[:end].split(_END):
            if b'"rtap"' in event:
                self._read(event)
        return data[:end]

    def rest(self) -> bytes:
        """Bytes held back, at the end of a complete stream."""
        held, self._held = self._held, b""
        return held

    def _read(self, event: bytes) -> None:
        start = event.find(_DATA)
        try:
            chunk: Any = msgspec.json.decode(event[start + len(_DATA) :])
        except msgspec.DecodeError:
            return
        if not isinstance(chunk, dict):
            return
        fields = cast(dict[str, Any], chunk)
        rtap = fields.get("rtap")
        if isinstance(rtap, dict) and cast(dict[str, Any], rtap).get("event") == "cycle":
            self.tokens += _cycle_tokens(cast(dict[str, Any], rtap)["cycle"])
            return
        total = _trajectory_tokens(fields)
        if total is not None:
            self.tokens = total  # includes the cycles reported before


def _trajectory_tokens(reply: Mapping[str, Any]) -> int | None:
    """Tokens of all trajectories in a reply or in the last event of a stream; None without any."""
    if isinstance(reply.get("response"), dict):  # /v1/responses nests the whole reply in its last event
        reply = cast(dict[str, Any], reply["response"])
    per_choice = reply.get("rtap_choices") or [c["rtap"] for c in reply.get("choices") or () if "rtap" in c]
    found: list[Any] = per_choice or [reply.get("rtap")]
    trajectories = [cast(dict[str, Any], t) for t in found if isinstance(t, dict) and "cycles" in t]
    if not trajectories:
        return None
    return sum(t["discarded_tokens"] + sum(map(_cycle_tokens, t["cycles"])) for t in trajectories)


def _cycle_tokens(cycle: Mapping[str, int]) -> int:
    return cycle["tokens"] + cycle["prompt_tokens"] - cycle["cached_tokens"]


def merge_metrics(texts: Mapping[str, str]) -> str:
    """Merge the expositions of several replicas; every sample gets the label ``replica``."""
    from prometheus_client.core import Metric
    from prometheus_client.exposition import generate_latest
    from prometheus_client.parser import text_string_to_metric_families
    from prometheus_client.registry import Collector, CollectorRegistry

    families: dict[str, Metric] = {}
    for replica, text in texts.items():
        for family in text_string_to_metric_families(text):
            whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            whole.samples += [s._replace(labels={**s.labels, "replica": replica}) for s in family.samples]

    class MergedCollector(Collector):
        def collect(self) -> Iterable[Metric]:
            return families.values()

    registry = CollectorRegistry(auto_describe=False)
    registry.register(MergedCollector())
    return generate_latest(registry).decode()
