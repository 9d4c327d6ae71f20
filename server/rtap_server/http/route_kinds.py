"""Which POST does what, of all that vLLM and we mount: recursion, other model work, nothing much, or nothing at all.

Plain tables. A test walks the app's routes and fails on one that is in none of them.
"""

RECURSIVE_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})

# Model work without recursion: it takes a place among the requests that are answered at a time. True: it writes
# tokens, so many as a request of its kind may write count as well.
WORKING_PATHS = {
    "/inference/v1/generate": True,
    "/v1/audio/transcriptions": True,
    "/v1/audio/translations": True,
    "/generative_scoring": False,
    "/v1/systemone": False,
    "/v1/rtap/score": False,
    "/pooling": False,
    "/classify": False,
    "/score": False,
    "/v1/score": False,
    "/rerank": False,
    "/v1/rerank": False,
    "/v2/rerank": False,
    "/v1/embeddings": False,
    "/v2/embed": False,
}

# Neither: text to tokens and back, verdicts, a request's end, probes of other platforms.
LIGHT_PATHS = frozenset(
    {
        "/tokenize",
        "/detokenize",
        "/v1/messages/count_tokens",
        "/v1/chat/completions/render",
        "/v1/completions/render",
        "/v1/messages/render",
        "/v1/responses/render",
        "/v1/chat/completions/derender",
        "/v1/completions/derender",
        "/v1/responses/{response_id}/cancel",
        "/inference/v1/abort_requests",
        "/v1/rtap/feedback",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/ping",
    }
)

_NOT_RECURSIVE = "it does not recurse; send single requests to /v1/chat/completions"
# Of vLLM's routes that it mounts whatever its flags: other ways into generation, whose replies would show everything as
# reasoning, and the one that restarts engines.
REFUSED_PATHS = {
    "/v1/chat/completions/batch": _NOT_RECURSIVE,
    "/invocations": _NOT_RECURSIVE,
    "/scale_elastic_ep": "this server scales by replicas",
    "/is_scaling_elastic_ep": "this server scales by replicas",
}
RESPONSES_PATH, RESPONSES = "/v1/responses", "/v1/responses/"
ABORT_PATHS = frozenset({"/abort_requests", "/inference/v1/abort_requests"})  # by ids that clients may choose
