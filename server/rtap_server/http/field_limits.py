"""What a request may ask for, looked at before anything is tokenised: counts, depth, templates, addresses.

Pure functions on the decoded body. What is of a wrong type is left to vLLM's own validation, which says so in its
words; what has the right type and is too much of it is refused here.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

from rtap_core.errors import InvalidRequest
from rtap_server.http.schema import lax_int

STOPS, STOP_CHARACTERS, BIASES, DEPTH = 16, 256, 1024, 64
CHARACTERS = 64
_LISTS = {"messages": "messages", "input": "items", "prompt": "prompts"}
_IDS = ("prompt", "tokens", "token_ids")
_TEMPLATES = ("chat_template", "chat_template_kwargs")
_MEDIA = frozenset({"image_url", "audio_url", "video_url"})
# Of a request, what describes tools and results and fetches nothing: an address there is a word like any other.
_NO_MEDIA = frozenset(
    {"tools", "functions", "tool_choice", "response_format", "structured_outputs", "metadata", "text"}
)
_CALLS = frozenset({"tool_calls", "function_call"})  # of a message: what a model said, and says no address to us
_DOMAINS, _FILES = ("http", "https"), ("file",)
_CONTAINERS = (dict, list)


@dataclass(frozen=True, slots=True)
class Caps:
    """n: choices of a request. messages: of a chat, items of an input, or prompts of a completion. ids: tokens of a
    prompt that comes as such; texts may have CHARACTERS for each of them where vLLM does not count itself.
    allows_templates: requests bring their own. media_schemes: how an address of media may begin, besides ``data:``;
    vLLM then looks at what follows."""

    n: int
    messages: int
    ids: int
    allows_templates: bool
    media_schemes: frozenset[str] = frozenset()

    def check(self, request: Mapping[str, Any]) -> None:
        """Raise InvalidRequest, with the field, for what is too much or not allowed."""
        params: Any = request.get("sampling_params")  # where a request has them apart
        for asked in (request, cast(dict[str, Any], params) if isinstance(params, dict) else {}):
            self._counts(asked)
            _stops(asked)
        nested: dict[str, Any] = {name: value for name, value in request.items() if isinstance(value, _CONTAINERS)}
        if is_deeper(nested, DEPTH):
            raise InvalidRequest(f"the request body is nested more than {DEPTH} deep")
        if not self.allows_templates:
            for name in filter(request.get, _TEMPLATES):
                raise InvalidRequest(
                    f"{name} of a request is not allowed here: a template is code that the server runs "
                    "(--allow-request-templates)",
                    param=name,
                )
        for name in nested.keys() - _NO_MEDIA:
            for address in _addresses(nested[name]):
                if address.partition(":")[0].lower() not in ("data", *self.media_schemes):
                    raise InvalidRequest(
                        "media must come as data: URLs; this server fetches from no such address "
                        "(--allowed-media-domains, --allowed-local-media-path)",
                        param=name,
                    )

    def check_length(self, request: Mapping[str, Any]) -> None:
        """Raise InvalidRequest for more text than any prompt could have. For the routes that would read it all: they
        have no limit of their own, as generation has."""
        length, most = sum(len(text) for text in texts(request) if not text.startswith("data:")), self.ids * CHARACTERS
        if length > most:
            raise InvalidRequest(
                f"{length} characters are more than {most}, {CHARACTERS} for each of the model's tokens"
            )

    def _counts(self, request: Mapping[str, Any]) -> None:
        n = lax_int(request.get("n"))
        if n is not None and n > self.n:
            raise InvalidRequest(f"n is {n}, and at most {self.n} choices are written", param="n")
        for name, what in _LISTS.items():
            given = request.get(name)
            if not isinstance(given, list):
                continue
            given = cast(list[Any], given)
            if len(given) > self.messages and not isinstance(given[0], int):
                raise InvalidRequest(f"{len(given)} {what} are more than {self.messages}", param=name)
        for name in _IDS:
            if (length := _most_ids(request.get(name))) > self.ids:
                raise InvalidRequest(f"{length} tokens are more than the model's {self.ids}", param=name)
        biases = request.get("logit_bias")
        if isinstance(biases, dict) and len(cast(dict[str, Any], biases)) > BIASES:
            raise InvalidRequest(f"logit_bias has more than {BIASES} entries", param="logit_bias")


def _most_ids(value: Any) -> int:
    """Of a list of token ids, or of lists of them: the length of the longest."""
    if not isinstance(value, list) or not value:
        return 0
    parts = cast(list[Any], value)
    if isinstance(parts[0], int):
        return len(parts)
    return max((len(cast(list[Any], part)) for part in parts if isinstance(part, list)), default=0)


def _stops(request: Mapping[str, Any]) -> None:
    for name in ("stop", "stop_sequences", "stop_token_ids", "bad_words"):
        if (given := request.get(name)) is None:
            continue
        stops = cast(list[Any], given) if isinstance(given, list) else [given]
        if len(stops) > STOPS:
            raise InvalidRequest(f"{name} has {len(stops)} entries, and at most {STOPS} are looked for", param=name)
        if any(isinstance(stop, str) and len(stop) > STOP_CHARACTERS for stop in stops):
            raise InvalidRequest(f"an entry of {name} is longer than {STOP_CHARACTERS} characters", param=name)


def is_deeper(value: Any, depth: int) -> bool:
    """Whether objects and lists are nested more than ``depth`` deep in it."""
    return next(islice(_levels(value), depth, None), None) is not None


def _levels(value: Any) -> Iterator[list[dict[str, Any] | list[Any]]]:
    """The objects and lists in it, those of one depth at a time. No recursion, so no depth harms it."""
    level: list[Any] = [value] if isinstance(value, _CONTAINERS) else []
    while level:
        yield level
        inside: list[Any] = [outer.values() if isinstance(outer, dict) else outer for outer in level]
        level = [inner for values in inside for inner in values if isinstance(inner, _CONTAINERS)]


def texts(value: Any) -> Iterator[str]:
    """Every text among the values in it."""
    if isinstance(value, str):
        yield value
    for level in _levels(value):
        for part in level:
            yield from (v for v in (part.values() if isinstance(part, dict) else part) if isinstance(v, str))


def _addresses(value: Any) -> Iterator[str]:
    """Addresses of media anywhere in messages: OpenAI's ``image_url`` and its like, Anthropic's ``source``.

    What a model called a tool with is not media, whatever it is called."""
    level: list[Any] = [value]
    while level:
        inner: list[Any] = []
        for part in level:
            if isinstance(part, dict):
                fields = cast(dict[str, Any], part)
                yield from _addresses_in(fields)
                is_call = fields.get("type") == "tool_use"
                inner += [v for k, v in fields.items() if k not in _CALLS and not (is_call and k == "input")]
            else:
                inner += cast(list[Any], part)
        level = [part for part in inner if isinstance(part, _CONTAINERS)]


def _addresses_in(fields: Mapping[str, Any]) -> Iterator[str]:
    for name in fields.keys() & _MEDIA:
        named = fields[name]
        address = cast(dict[str, Any], named).get("url") if isinstance(named, dict) else named
        if isinstance(address, str):
            yield address
    if fields.get("type") == "url" and isinstance(fields.get("url"), str):
        yield fields["url"]


def media_schemes(allowed_domains: Sequence[str] | None, local_path: str | None) -> frozenset[str]:
    """``Caps.media_schemes`` by vLLM's two flags."""
    return frozenset((*(_DOMAINS if allowed_domains else ()), *(_FILES if local_path else ())))
