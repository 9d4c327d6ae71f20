"""What leaves the server besides replies: texts of errors without what a request said, log records without it too.

Error texts of libraries repeat values, name files and print addresses; their log lines at DEBUG print whole requests.
Nothing here knows a route. Whoever wants requests in the log asks vLLM for it (``--enable-log-requests``), and then
nothing is held back from it.
"""

import logging
import re
import traceback
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, cast

_MOST_STRINGS, _STRING_CHARACTERS, _MOST_CHARACTERS = 10_000, 4096, 2**18  # of a request, looked for in an error
_LEAST = 6  # a shorter value is a word of the language more often than one of the request's own
_RUN, _STEP = 12, 4  # a run of so many characters, looked for at every so many: 15 in a row do not pass
_WORDS_OF_THE_API = frozenset({"model", "role", "type"})  # their values say which, not what
_WORD = re.compile(r"[\w./:-]{1,64}")
_CUT = "…"
_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{4,}")
_FRAME = re.compile(r'\s*File "[^"]*", line \d+.*|\s*Traceback \(most recent call last\):?')
_INPUT = re.compile(r"\s*\[type=\w+, input_value=.*?, input_type=\w+\]|\s*For further information visit \S+", re.DOTALL)
_PATH = re.compile(r"(?<![\w/:.])(?:file:/*)?/(?!v\d+/|inference/)[\w.~-]+(?:/[\w.~-]+)+")

_TALKATIVE = ("entrypoints", "renderers", "multimodal", "tool_parsers", "reasoning", "parser", "tokenizers", "inputs")


def texts_of(request: Mapping[str, Any]) -> list[str]:
    """What a request said, for ``without``: the values of its fields, longest first."""
    found, size = set[str](), 0
    for text in islice(_strings(request), _MOST_STRINGS):
        size += min(len(text), _STRING_CHARACTERS)
        if len(text) >= _LEAST and size <= _MOST_CHARACTERS:
            found.add(text[:_STRING_CHARACTERS])
    return sorted(found, key=len, reverse=True)


def without(message: str, texts: list[str]) -> str:
    """``message`` with neither one of ``texts`` in it nor a run of characters of one."""
    for text in texts:
        if len(text) <= len(message):
            message = message.replace(text, _CUT)
    everything = "\0".join(texts)
    said = [False] * len(message)
    for start in range(0, len(message) - _RUN + 1, _STEP):
        if message[start : start + _RUN] in everything:
            said[start : start + _RUN] = [True] * _RUN
    shown = "".join("\0" if is_said else character for character, is_said in zip(message, said, strict=True))
    return re.sub("\0+", _CUT, shown)


def without_internals(message: str) -> str:
    """``message`` with no file, no address, no stack trace and none of pydantic's echoes in it."""
    told = _INPUT.sub("", _FRAME.sub("", message))
    return _PATH.sub("<path>", _ADDRESS.sub("<address>", told)).strip()


def _strings(request: Mapping[str, Any]) -> Iterator[str]:
    """Values at any depth, without recursion."""
    level: list[Any] = [request]
    while level:
        yield from (part for part in level if isinstance(part, str))
        inner = list[Any]()
        for part in level:
            if isinstance(part, dict):
                fields = cast(dict[str, Any], part)
                inner += [value for name, value in fields.items() if not _is_word(name, value)]
            elif isinstance(part, list):
                inner += cast(list[Any], part)
        level = inner


def _is_word(name: str, value: object) -> bool:
    return name in _WORDS_OF_THE_API and isinstance(value, str) and _WORD.fullmatch(value) is not None


def keep_logs_private() -> None:
    """From here on, in this process: no request in a log line, at whatever level vLLM and uvicorn write.

    vLLM's modules that read requests stay silent below INFO. An exception is logged by its type and its frames, because
    its text may repeat a value. An access line has no query string."""
    for name in _TALKATIVE:
        logging.getLogger(f"vllm.{name}").setLevel(max(logging.INFO, logging.getLogger("vllm").level))
    logging.getLogger("uvicorn.access").addFilter(_without_query)
    before = logging.getLogRecordFactory()
    if not isinstance(before, _PrivateRecords):
        logging.setLogRecordFactory(_PrivateRecords(before))


class _PrivateRecords:
    """A record factory around another."""

    def __init__(self, factory: Any) -> None:
        self._factory = factory

    def __call__(self, *args: Any, **options: Any) -> logging.LogRecord:
        record: logging.LogRecord = self._factory(*args, **options)
        if record.exc_info and record.exc_info[0] is not None:
            kind, _, frames = record.exc_info
            record.exc_text = (
                "".join(traceback.format_tb(frames)) + kind.__name__
            )  # what formatters print, if it is there
        if isinstance(record.args, tuple):
            record.args = tuple(_named(value) for value in record.args)
        return record


def _named(value: object) -> object:
    """An exception, or a request or reply of vLLM's, by its type."""
    is_told = isinstance(value, BaseException) or hasattr(type(value), "model_fields")
    return type(value).__name__ if is_told else value


def _without_query(record: logging.LogRecord) -> bool:
    """uvicorn's arguments are: client, method, path, version, status."""
    if isinstance(record.args, tuple) and len(record.args) > 2:
        client, method, path, *rest = record.args
        record.args = (client, method, str(path).partition("?")[0], *rest)
    return True
