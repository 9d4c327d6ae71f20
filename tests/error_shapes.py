"""The shape of an error body: Anthropic's below /v1/messages, OpenAI's on every other path."""

from typing import Any


def error_of(path: str, body: Any) -> dict[str, Any]:
    """The error object of a reply to ``path``, in the shape of its path."""
    if path.startswith("/v1/messages"):
        assert (set(body), body["type"]) == ({"type", "error", "request_id"}, "error"), body
        assert set(body["error"]) == {"type", "message"}, body
    else:
        assert (set(body), set(body["error"])) == ({"error"}, {"message", "type", "param", "code"}), body
        assert body["error"]["code"] is None or isinstance(body["error"]["code"], str), body
    assert body["error"]["message"]
    return body["error"]
