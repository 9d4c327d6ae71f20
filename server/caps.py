"""What a request may ask for, looked at before anything is tokenised: counts, depth, templates, addresses.

Pure functions on the decoded body. What is of a wrong type is left to vLLM's own validation, which says so in its
words; what has the right type and is too much of it is refused here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

from server.rtap.errors import InvalidRequest
from server.wire import lax_int

STOPS, STOP_CHARACTERS, BIASES, DEPTH = 16, 256, 1024, 64
_LISTS = {"messages": "messages", "input": "items", "prompt": "prompts"}
_TEMPLATES = ("chat_template", "chat_template_kwargs")
_MEDIA = ("image_url", "audio_url", "video_url")


@dataclass(frozen=True, slots=True)
class Caps:
    """n: choices of a request. messages: of a chat, items of an input, or prompts of a completion.
    allows_templates: requests bring their own. allows_media_urls: media may be named by an address."""

    n: int
    messages: int
    allows_templates: bool
    allows_media_urls: bool

    def check(self, request: Mapping[str, Any]) -> None:
        """Raise InvalidRequest, with the field, for what is too much or not allowed."""
        self._counts(request)
        _stops(request)
        if is_deeper(request, DEPTH):
            raise InvalidRequest(f"the request body is nested more than {DEPTH} deep")
        if not self.allows_templates:
            for name in filter(request.get, _TEMPLATES):
                raise InvalidRequest(
                    f"{name} of a request is not allowed here: a template is code that the server runs "
                    "(--allow-request-templates)",
                    param=name,
                )
        if not self.allows_media_urls:
            for name in ("messages", "input"):
                if not all(address.startswith("data:") for address in _addresses(request.get(name))):
                    raise InvalidRequest(
                        "media must come as data: URLs; this server fetches nothing (--allowed-media-domains)",
                        param=name,
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
            if len(given) > self.messages and not isinstance(given[0], int):  # ids of one prompt have their own limit
                raise InvalidRequest(f"{len(given)} {what} are more than {self.messages}", param=name)
        biases = request.get("logit_bias")
        if isinstance(biases, dict) and len(cast(dict[str, Any], biases)) > BIASES:
            raise InvalidRequest(f"logit_bias has more than {BIASES} entries", param="logit_bias")


def _stops(request: Mapping[str, Any]) -> None:
    for name in ("stop", "stop_sequences", "stop_token_ids", "bad_words"):
        given = request.get(name)
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
    level: list[Any] = [value]
    while nested := [cast(dict[str, Any] | list[Any], part) for part in level if isinstance(part, dict | list)]:
        yield nested
        level = [inner for outer in nested for inner in (outer.values() if isinstance(outer, dict) else outer)]


def _addresses(value: Any) -> Iterator[str]:
    """Addresses of media anywhere in messages: OpenAI's ``image_url`` and its like, Anthropic's ``source``."""
    for fields in (part for level in _levels(value) for part in level if isinstance(part, dict)):
        for name in _MEDIA:
            named = fields.get(name)
            address = cast(dict[str, Any], named).get("url") if isinstance(named, dict) else named
            if isinstance(address, str):
                yield address
        if fields.get("type") == "url" and isinstance(fields.get("url"), str):
            yield fields["url"]
