"""Limits on the fields of a request body, checked before anything is tokenised: counts, depth, templates, media.

Pure functions on the decoded body. Wrong types are vLLM's to refuse; here a right type with too much in it is refused.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

from pydantic import TypeAdapter, ValidationError

from rtap_core.errors import InvalidRequest
from rtap_server.http.grammar_limits import check_constraints

MAX_STOPS, MAX_STOP_CHARACTERS, MAX_LOGIT_BIASES, MAX_DEPTH = 16, 256, 1024, 64
CHARACTERS_PER_TOKEN = 16  # several times what text has on average
# vLLM tokenises in threads, but lists tokens on the event loop, and on a few routes tokenises there: below 0.5 s.
MAX_CHARACTERS, MAX_CHARACTERS_ON_LOOP = 2**19, 2**15
_LISTS = {"messages": "messages", "input": "items", "prompt": "prompts"}
_IDS = ("prompt", "tokens", "token_ids")
# Template variables that requests may not set. The first line is what vLLM and the template set themselves.
_TEMPLATE_VARIABLES = frozenset(
    {"messages", "bos_token", "eos_token", "pad_token", "unk_token", "raise_exception", "strftime_now"}
    | {"conversation", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message"}
    | {"tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"}
    | {"return_assistant_tokens_mask"}
)
_TEMPLATE_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_MAX_SWITCHES = 16
_TRANSFERS = ("kv_transfer_params", "ec_transfer_params")
_MEDIA = frozenset({"image_url", "audio_url", "video_url"})
# Where a part of a message with one of these types has its media.
_MEDIA_TYPES = frozenset({*_MEDIA, "input_image", "input_audio", "input_file", "file", "base64"})
_MEDIA_DATA = frozenset({*_MEDIA, "input_audio", "file", "file_data", "data"})
# Fields that describe tools and results: a URL in them is text and fetches nothing.
_NO_MEDIA = frozenset(
    {"tools", "functions", "tool_choice", "response_format", "structured_outputs", "metadata", "text"}
)
_TOOL_CALLS = frozenset({"tool_calls", "function_call"})  # written by a model; nothing in them is fetched
_DOMAINS, _FILES = ("http", "https"), ("file",)
_CONTAINERS = (dict, list)


@dataclass(frozen=True, slots=True)
class FieldLimits:
    """Upper bounds for one request.

    n: choices. messages: messages of a chat, items of an input, or prompts of a completion. token_ids: length of a
    prompt of token ids; text may have CHARACTERS_PER_TOKEN times as many characters. allows_templates: accept chat
    templates from requests. media_schemes: URL schemes allowed for media besides ``data:``; vLLM checks the rest of
    the URL."""

    n: int
    messages: int
    token_ids: int
    allows_templates: bool
    media_schemes: frozenset[str] = frozenset()

    def check(self, request: Mapping[str, Any]) -> None:
        """Raise InvalidRequest, naming the field, for the first limit that is exceeded."""
        params: Any = request.get("sampling_params")  # of /inference/v1/generate
        for asked in (request, cast(dict[str, Any], params) if isinstance(params, dict) else {}):
            self._counts(asked)
            _stops(asked)
            _transfers(asked)
        nested: dict[str, Any] = {name: value for name, value in request.items() if isinstance(value, _CONTAINERS)}
        if is_deeper(nested, MAX_DEPTH):
            raise InvalidRequest(f"the request body is nested more than {MAX_DEPTH} levels deep")
        check_constraints(request)
        if isinstance(params, dict):
            check_constraints(cast(dict[str, Any], params), "sampling_params.")
        if not self.allows_templates:
            _templates(request)
        for name in nested.keys() - _NO_MEDIA:
            for address in _media_urls(nested[name]):
                if address.partition(":")[0].lower() not in ("data", *self.media_schemes):
                    raise InvalidRequest(
                        f"media URL {address[:40]!r} is not allowed: send a data: URL, or start the server with "
                        "--allowed-media-domains or --allowed-local-media-path",
                        param=name,
                    )

    def check_length(self, request: Mapping[str, Any], *, most: int | None = None) -> None:
        """Raise InvalidRequest for more text than any prompt could have, because tokenising it would delay others.

        most: characters at most, on routes where vLLM has no limit."""
        length, limit = text_length(request), self.token_ids * CHARACTERS_PER_TOKEN
        if length > limit:
            raise InvalidRequest(
                f"the request has {length} characters, more than {CHARACTERS_PER_TOKEN} for each of {self.token_ids} "
                "tokens, the length of the model's context; shorten it"
            )
        if most is not None and length > most:
            raise InvalidRequest(
                f"the request has {length} characters; at most {most} are allowed on this route: divide the text"
            )

    def _counts(self, request: Mapping[str, Any]) -> None:
        n = lax_int(request.get("n"))
        if n is not None and n > self.n:
            raise InvalidRequest(f"n={n} is above this server's limit of {self.n}", param="n")
        for name, what in _LISTS.items():
            given = request.get(name)
            if not isinstance(given, list):
                continue
            given = cast(list[Any], given)
            if len(given) > self.messages and not isinstance(given[0], int):
                raise InvalidRequest(
                    f"{len(given)} {what} are above this server's limit of {self.messages}", param=name
                )
        for name in _IDS:
            if (length := _longest_ids(request.get(name))) > self.token_ids:
                raise InvalidRequest(
                    f"{length} tokens in {name} are more than the model's context of {self.token_ids}", param=name
                )
        biases = request.get("logit_bias")
        if isinstance(biases, dict) and len(cast(dict[str, Any], biases)) > MAX_LOGIT_BIASES:
            raise InvalidRequest(f"logit_bias has more than {MAX_LOGIT_BIASES} entries", param="logit_bias")


def _longest_ids(value: Any) -> int:
    """Length of the longest list of token ids in ``value``, which is one such list or a list of them."""
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
        if len(stops) > MAX_STOPS:
            raise InvalidRequest(f"{name} has {len(stops)} entries; at most {MAX_STOPS} are allowed", param=name)
        if any(isinstance(stop, str) and len(stop) > MAX_STOP_CHARACTERS for stop in stops):
            raise InvalidRequest(f"an entry of {name} is longer than {MAX_STOP_CHARACTERS} characters", param=name)


def _templates(request: Mapping[str, Any]) -> None:
    """Refuse templates and their variables, but for switches such as ``enable_thinking``."""
    if request.get("chat_template"):
        raise InvalidRequest(
            "chat_template is not allowed in requests: a template is code that the server runs; start it with "
            "--allow-request-templates to accept it",
            param="chat_template",
        )
    given: Any = request.get("chat_template_kwargs")
    if not isinstance(given, dict):
        return  # vLLM refuses what is neither an object nor null
    given = cast(dict[str, Any], given)
    for name, value in given.items():
        is_switch = isinstance(value, bool) or (name == "reasoning_effort" and value in _TEMPLATE_EFFORTS)
        if not is_switch or name in _TEMPLATE_VARIABLES or not name.isidentifier() or len(given) > _MAX_SWITCHES:
            raise InvalidRequest(
                f"chat_template_kwargs.{name[:40]} is not allowed: requests may set switches of the template to true "
                "or false, and reasoning_effort; the flag --allow-request-templates allows more",
                param="chat_template_kwargs",
            )


def _transfers(request: Mapping[str, Any]) -> None:
    """Refuse transfer parameters of a wrong type inside dictionaries that vLLM passes to the engine unchecked."""
    for field in ("vllm_xargs", "extra_args"):
        entries: Any = request.get(field)
        for name in _TRANSFERS if isinstance(entries, dict) else ():
            value: Any = cast(dict[str, Any], entries).get(name)
            if value is not None and not isinstance(value, dict):
                raise InvalidRequest(f"{field}.{name}={str(value)[:40]!r} must be an object", param=field)


def is_deeper(value: Any, depth: int) -> bool:
    """True when objects and lists in ``value`` are nested more than ``depth`` levels deep."""
    return next(islice(_levels(value), depth, None), None) is not None


def _levels(value: Any) -> Iterator[list[dict[str, Any] | list[Any]]]:
    """Objects and lists in ``value``, one nesting level at a time, without recursion."""
    level: list[Any] = [value] if isinstance(value, _CONTAINERS) else []
    while level:
        yield level
        inside: list[Any] = [outer.values() if isinstance(outer, dict) else outer for outer in level]
        level = [inner for values in inside for inner in values if isinstance(inner, _CONTAINERS)]


def text_length(value: Any) -> int:
    """Characters of all strings in ``value``, at any depth, except those of media, which nothing tokenises."""
    length, level = 0, [value]
    while level:
        inside: list[Any] = []
        for part in level:
            if isinstance(part, str):
                length += len(part)
            elif isinstance(part, list):
                inside += cast(list[Any], part)
            elif isinstance(part, dict):
                fields = cast(dict[str, Any], part)
                media = _MEDIA_DATA if fields.get("type") in _MEDIA_TYPES else _MEDIA
                inside += [inner for name, inner in fields.items() if name not in media]
        level = inside
    return length


def _media_urls(value: Any) -> Iterator[str]:
    """Media URLs anywhere in messages: OpenAI's ``image_url`` and similar, Anthropic's ``source``.

    Arguments of tool calls are skipped."""
    level: list[Any] = [value]
    while level:
        inner: list[Any] = []
        for part in level:
            if isinstance(part, dict):
                fields = cast(dict[str, Any], part)
                yield from _media_urls_of(fields)
                is_call = fields.get("type") == "tool_use"
                inner += [v for k, v in fields.items() if k not in _TOOL_CALLS and not (is_call and k == "input")]
            else:
                inner += cast(list[Any], part)
        level = [part for part in inner if isinstance(part, _CONTAINERS)]


def _media_urls_of(fields: Mapping[str, Any]) -> Iterator[str]:
    for name in fields.keys() & _MEDIA:
        named = fields[name]
        address = cast(dict[str, Any], named).get("url") if isinstance(named, dict) else named
        if isinstance(address, str):
            yield address
    if fields.get("type") == "url" and isinstance(fields.get("url"), str):
        yield fields["url"]


def media_schemes(allowed_domains: Sequence[str] | None, local_path: str | None) -> frozenset[str]:
    """``FieldLimits.media_schemes`` for vLLM's two media flags."""
    return frozenset((*(_DOMAINS if allowed_domains else ()), *(_FILES if local_path else ())))


def lax_int(value: Any) -> int | None:
    """An integer as vLLM's requests parse one; None for a value that vLLM refuses."""
    if value is None or type(value) is int:
        return value
    try:
        return _LAX_INT.validate_python(value)
    except ValidationError:
        return None


_LAX_INT = TypeAdapter(int)
