"""What the gateway reads of a request and of a reply: which conversation it belongs to, and what it cost.

Pure: no Ray, no sockets. Where requests go is Ray's consistent hashing over what ``conversation_of`` gives.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec

_SESSION_HEADER = b"x-session-id"  # Ray Serve's own name for it
_END = b"\n\n"
_DATA = b"data:"


@dataclass(frozen=True, slots=True)
class Asked:
    """One whole HTTP request; header names in lower case."""

    method: str
    path: str
    query: bytes = b""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Head:
    """How a reply begins."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...] = ()

    @property
    def is_stream(self) -> bool:
        """Whether server-sent events follow."""
        return dict(self.headers).get(b"content-type", b"").startswith(b"text/event-stream")


def conversation_of(asked: Asked) -> str:
    """The same for all turns of one conversation, so that they meet the prefix cache that holds its beginning; empty
    where there is none, and any replica will do.

    What the client says wins: the header ``x-session-id``, then the field ``prompt_cache_key``. Else it is how the
    conversation begins: all up to the first message of the user, or the whole prompt. The key is part of it, because
    each key has a cache of its own."""
    headers = dict(asked.headers)
    said = headers.get(_SESSION_HEADER)
    begins = said if said else _beginning(asked.body) if asked.method == "POST" else None
    if not begins:
        return ""
    key = headers.get(b"authorization", headers.get(b"x-api-key", b""))
    return hashlib.sha256(key + b"\0" + begins).hexdigest()[:32]


def _beginning(body: bytes) -> bytes | None:
    """The part of a request body that a later turn repeats."""
    try:
        request: Any = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return None  # the replica says what is wrong with it
    if not isinstance(request, dict):
        return None
    fields = cast(dict[str, Any], request)
    named = fields.get("prompt_cache_key")
    if isinstance(named, str) and named:
        return named.encode()
    turns: Any = fields.get("messages", fields.get("input", fields.get("prompt")))
    if turns is None:
        return None
    if isinstance(turns, list):
        turns = list(_to_first_question(cast(list[Any], turns)))
    return msgspec.json.encode([fields.get("model"), fields.get("system"), fields.get("instructions"), turns])


def _to_first_question(turns: list[Any]) -> Iterable[Any]:
    """Messages up to the first one of the user; all of what are no messages (token ids, several prompts)."""
    for turn in turns:
        yield turn
        if isinstance(turn, dict) and cast(dict[str, Any], turn).get("role") == "user":
            return


def tokens_of_reply(body: bytes) -> int:
    """Tokens that a whole reply was charged for by the replica: sampled, and read outside the prefix cache, or read for
    a score."""
    try:
        reply: Any = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return 0
    if not isinstance(reply, dict):
        return 0
    fields = cast(dict[str, Any], reply)
    return int(fields["confidence_tokens"]) if fields.get("object") == "rtap.score" else _tokens_told(fields) or 0


@dataclass(slots=True)
class EventReader:
    """Reads a stream of server-sent events as it passes. tokens: what the stream has said so far that it cost."""

    tokens: int = 0
    _held: bytes = field(init=False, default=b"")

    def feed(self, data: bytes) -> bytes:
        """The events that are complete with ``data``. The rest is held back: where a replica dies in the middle of an
        event, the client must not see half of it before the error."""
        data = self._held + data
        end = data.rfind(_END) + len(_END) if _END in data else 0
        self._held = data[end:]
        for event in data[:end].split(_END):
            if b'"rtap"' in event:
                self._read(event)
        return data[:end]

    def rest(self) -> bytes:
        """What was held back, when the stream has ended well."""
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
        told = fields.get("rtap")
        if isinstance(told, dict) and cast(dict[str, Any], told).get("event") == "cycle":
            self.tokens += _tokens_of_cycle(cast(dict[str, Any], told)["cycle"])
            return
        total = _tokens_told(fields)
        if total is not None:
            self.tokens = total  # the cycles told before are in it


def _tokens_told(reply: Mapping[str, Any]) -> int | None:
    """Sum over the trajectories that a reply or its last event tells of; None if it tells of none."""
    if isinstance(reply.get("response"), dict):  # /v1/responses nests the whole reply in its last event
        reply = cast(dict[str, Any], reply["response"])
    told = reply.get("rtap_choices") or [c["rtap"] for c in reply.get("choices") or () if "rtap" in c]
    given: list[Any] = told or [reply.get("rtap")]
    trajectories = [cast(dict[str, Any], t) for t in given if isinstance(t, dict) and "cycles" in t]
    if not trajectories:
        return None
    return sum(t["discarded_tokens"] + sum(map(_tokens_of_cycle, t["cycles"])) for t in trajectories)


def _tokens_of_cycle(cycle: Mapping[str, int]) -> int:
    return cycle["tokens"] + cycle["prompt_tokens"] - cycle["cached_tokens"]


def labelled(texts: Mapping[str, str]) -> str:
    """Expositions of several replicas as one: every sample gets the label ``replica`` with its name here."""
    from prometheus_client.core import Metric
    from prometheus_client.exposition import generate_latest
    from prometheus_client.parser import text_string_to_metric_families
    from prometheus_client.registry import Collector, CollectorRegistry

    families: dict[str, Metric] = {}
    for replica, text in texts.items():
        for family in text_string_to_metric_families(text):
            whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            whole.samples += [s._replace(labels={**s.labels, "replica": replica}) for s in family.samples]

    class Whole(Collector):
        def collect(self) -> Iterable[Metric]:
            return families.values()

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Whole())
    return generate_latest(registry).decode()
