"""Client of an rtap server, and the `rtap` command.

Names are imported on first use, so that `rtap --help` is fast.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rtap_client.client import RTAP, AsyncRTAP
    from rtap_client.streams import (
        AnswerEvent,
        CycleEvent,
        DoneEvent,
        DraftEvent,
        Event,
        IncompleteStream,
        ThinkingEvent,
        ToolCallEvent,
        events,
    )
    from rtap_client.types import (
        ChatChunk,
        ChatReply,
        Cycle,
        Draft,
        Feedback,
        RtapOptions,
        Score,
        ServerConfig,
        Trajectory,
        trajectory,
    )

try:
    __version__ = version("rtap")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+checkout"

_MODULES = {
    "RTAP": "client",
    "AsyncRTAP": "client",
    "events": "streams",
    "Event": "streams",
    "ThinkingEvent": "streams",
    "DraftEvent": "streams",
    "AnswerEvent": "streams",
    "ToolCallEvent": "streams",
    "CycleEvent": "streams",
    "DoneEvent": "streams",
    "IncompleteStream": "streams",
    "RtapOptions": "types",
    "ChatReply": "types",
    "ChatChunk": "types",
    "Trajectory": "types",
    "Cycle": "types",
    "Draft": "types",
    "Score": "types",
    "Feedback": "types",
    "ServerConfig": "types",
    "trajectory": "types",
}
__all__ = [  # noqa: RUF022 - in reading order
    "RTAP",
    "AsyncRTAP",
    "RtapOptions",
    "ChatReply",
    "ChatChunk",
    "Trajectory",
    "Cycle",
    "Draft",
    "trajectory",
    "events",
    "Event",
    "ThinkingEvent",
    "DraftEvent",
    "AnswerEvent",
    "ToolCallEvent",
    "CycleEvent",
    "DoneEvent",
    "IncompleteStream",
    "Score",
    "Feedback",
    "ServerConfig",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
