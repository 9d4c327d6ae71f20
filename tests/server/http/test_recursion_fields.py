"""Request options in, limits out, trajectory objects back."""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtap_core.artifact import Artifact
from rtap_core.errors import InvalidRequest
from rtap_core.types import Cycle, Limits, Policy, Select, StopReason, Trajectory
from rtap_server.engine.request_state import RequestState
from rtap_server.http.admission import Demand
from rtap_server.http.recursion_fields import continued_text, effort, parse_options, read_demand, resolve_limits
from rtap_server.http.schema import RtapOptions, trajectory_object
from rtap_server.settings import Settings

SETTINGS = Settings()
CYCLE = Cycle(0, "12*9=108", "108", 0.25, False, 20, 5, 1, 30, 16, 0.12345678, 0.002, 40)


def _trajectory(**changes) -> Trajectory:
    cycles = (CYCLE, replace(CYCLE, index=1, confidence=0.75, accepted=True, tokens=10))
    base = Trajectory(Policy.CONFIDENCE, StopReason.THRESHOLD, cycles, 1, None, 0.5, 0.5, None, None)
    return replace(base, **changes)


@pytest.mark.parametrize(
    ("raw", "param", "sentence"),
    [
        ({"treshold": 1}, "rtap.treshold", "unknown field rtap.treshold; known: policy, threshold"),
        ({"threshold": 1.01}, "rtap.threshold", "rtap.threshold=1.01: Input should be less than or equal to 1"),
        ({"threshold": "0.5"}, "rtap.threshold", "rtap.threshold='0.5': Input should be a valid number"),
        ({"threshold": float("nan")}, "rtap.threshold", "rtap.threshold=nan"),
        ({"max_cycles": 0}, "rtap.max_cycles", "rtap.max_cycles=0: Input should be greater than or equal to 1"),
        ({"max_cycles": True}, "rtap.max_cycles", "rtap.max_cycles=True: Input should be a valid integer"),
        ({"max_cycles": 17}, "rtap.max_cycles", "rtap.max_cycles=17 is above this server's limit of 16"),
        ({"samples": 10**9}, "rtap.samples", "above this server's limit of 32"),
        ({"deadline_seconds": 1e9}, "rtap.deadline_seconds", "above this server's limit of 600.0"),
        ({"policy": "best"}, "rtap.policy", "rtap.policy='best'"),
        ([], "rtap", "rtap=[] must be an object"),
        (None, "rtap", "rtap=None must be an object"),
    ],
)
def test_bad_options_name_the_field(raw, param, sentence):
    with pytest.raises(InvalidRequest, match=re.escape(sentence)) as caught:
        parse_options({"rtap": raw}, SETTINGS)
    assert caught.value.param == param


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8), lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ), max_leaves=6,
)  # fmt: skip
_NEARLY = st.sampled_from([*Policy, *Select, "Vote", 1, 0, -1, 1.0, 0.5, 16, 17, 32, 33, 600.0, 600.5, True, None, "1"])
_OPTIONS = st.dictionaries(st.sampled_from(list(RtapOptions.model_fields)), _NEARLY | _JSON, max_size=9)


def _outcome(take: Callable[[], RtapOptions]) -> RtapOptions | InvalidRequest:
    try:
        return take()
    except InvalidRequest as error:
        return error


@given(st.one_of(_JSON, _OPTIONS, st.dictionaries(st.text(max_size=8), _NEARLY, max_size=3)))
def test_whatever_comes_there_are_options_within_the_ceilings_or_a_sentence(raw):
    options = _outcome(lambda: parse_options({"rtap": raw}, SETTINGS))
    if isinstance(options, InvalidRequest):
        assert (options.param or "").startswith("rtap")
        assert 0 < len(str(options)) < 500
        return
    for name, given_ in raw.items():  # nothing is taken for something else
        assert getattr(options, name) == given_ or name in ("return_cycles", "drafts"), name  # a flag may be "yes"
    assert (options.max_cycles or 1) <= SETTINGS.max_cycles_limit
    assert (options.samples or 1) <= SETTINGS.samples_limit
    assert 0 < (options.deadline_seconds or 1) <= SETTINGS.deadline_seconds_limit
    assert 0 <= (options.threshold or 0) <= 1
    limits = _limits(options)
    assert 1 <= limits.max_cycles <= SETTINGS.max_cycles_limit


@given(_OPTIONS)
def test_what_may_be_asked_by_field_may_be_asked_by_xargs(raw):
    by_field = _outcome(lambda: parse_options({"rtap": raw}, SETTINGS))
    by_xargs = {"vllm_xargs": {f"rtap_{name}": value for name, value in raw.items()}}
    second = _outcome(lambda: parse_options(by_xargs, SETTINGS))
    assert by_field == second or (isinstance(by_field, InvalidRequest) and isinstance(second, InvalidRequest))


def test_options_may_come_as_xargs_but_only_once():
    xargs = {"rtap_threshold": 0.9, "rtap_policy": "vote", "other": 1}
    assert parse_options({"vllm_xargs": xargs}, SETTINGS) == RtapOptions(threshold=0.9, policy=Policy.VOTE)
    assert parse_options({"vllm_xargs": {"other": 1}, "rtap": {"samples": 2}}, SETTINGS) == RtapOptions(samples=2)
    for without in ({}, {"vllm_xargs": None}, {"vllm_xargs": []}, {"vllm_xargs": {"other": 1}}):
        assert parse_options(without, SETTINGS) == RtapOptions()
    with pytest.raises(InvalidRequest, match="unknown field"):
        parse_options({"vllm_xargs": {"rtap_x": 1}}, SETTINGS)
    with pytest.raises(InvalidRequest, match="give the rtap options once"):
        parse_options({"vllm_xargs": xargs, "rtap": {}}, SETTINGS)


def _limits(options: RtapOptions, settings: Settings = SETTINGS, *, has_confidence: bool = True, **artifact) -> Limits:
    return resolve_limits(options, settings, Artifact(**artifact), has_confidence=has_confidence)


def test_defaults_follow_the_generator():
    loaded, bare = _limits(RtapOptions()), _limits(RtapOptions(), has_confidence=False)
    assert (loaded.policy, loaded.select, loaded.threshold) == (Policy.CONFIDENCE, Select.BEST, 0.5)
    assert (bare.policy, bare.select) == (Policy.MODEL, Select.LAST)
    assert loaded.max_tokens is None  # vLLM's default is the engine's to add


def test_a_vote_has_a_threshold_of_its_own_which_is_higher_where_confidences_weigh():
    vote, calibrated = (
        RtapOptions(policy=Policy.VOTE),
        Artifact(logistic={"bias": 0.0, "generator": 1.0}, threshold=0.3),
    )
    assert resolve_limits(vote, Settings(), Artifact(), has_confidence=False).threshold == 0.85
    assert resolve_limits(vote, Settings(), Artifact(threshold=0.3), has_confidence=True).threshold == 0.85
    assert resolve_limits(vote, Settings(), calibrated, has_confidence=True).threshold == 0.95
    assert resolve_limits(vote, Settings(threshold=0.7), calibrated, has_confidence=True).threshold == 0.7


def test_threshold_is_the_requests_then_the_servers_then_the_checkpoints():
    server = Settings(threshold=0.8)
    assert _limits(RtapOptions(threshold=0.0), server, threshold=0.6).threshold == 0.0
    assert _limits(RtapOptions(), server, threshold=0.6).threshold == 0.8
    assert _limits(RtapOptions(), threshold=0.6).threshold == 0.6


@pytest.mark.parametrize(
    ("word", "cycles", "threshold"),
    [
        (None, 8, 0.6), ("none", 1, 0.6), ("minimal", 1, 0.6), ("low", 2, 0.6), ("medium", 8, 0.6),
        ("high", 16, 0.8), ("max", 16, 0.9), ("enormous", 8, 0.6),
    ],
)  # fmt: skip
def test_effort_moves_the_servers_defaults_and_the_requests_own_fields_win(word, cycles, threshold):
    def limits(**own):
        return resolve_limits(RtapOptions(**own), SETTINGS, Artifact(threshold=0.6), has_confidence=True, effort=word)

    assert (limits().max_cycles, limits().threshold) == (cycles, pytest.approx(threshold))
    own = limits(max_cycles=3, threshold=0.1)
    assert (own.max_cycles, own.threshold) == (3, 0.1)


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ({"reasoning_effort": "low"}, "low"),
        ({"reasoning": {"effort": "high", "summary": "auto"}}, "high"),
        ({"output_config": {"effort": "max"}}, "max"),
        ({"thinking": {"type": "disabled"}}, "none"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, None),
        ({"reasoning": "high", "thinking": 1}, None),
        ({"reasoning_effort": 3}, None),
        ({}, None),
    ],
)
def test_effort_is_found_where_each_endpoint_has_it(request_, expected):
    assert effort(request_) == expected


def test_confidence_without_generator_is_refused():
    with pytest.raises(InvalidRequest, match="needs a confidence generator, and this server has none"):
        _limits(RtapOptions(policy=Policy.CONFIDENCE), has_confidence=False)


def test_the_response_object_holds_what_the_design_names():
    shown = trajectory_object(_trajectory(), with_think=False)
    assert set(shown) == {
        "policy", "stop_reason", "cycles", "confidence", "first_answer_seconds", "confidence_tokens", "discarded_tokens"
    }  # fmt: skip
    assert (shown["confidence"], shown["confidence_tokens"]) == (0.75, 80)
    assert shown["cycles"][0] == {
        "index": 0,
        "answer": "108",
        "confidence": 0.25,
        "accepted": False,
        "tokens": 20,
        "oops_tokens": 1,
        "prompt_tokens": 30,
        "cached_tokens": 16,
        "seconds": 0.123457,
        "confidence_seconds": 0.002,
    }
    assert trajectory_object(_trajectory(degraded="timeout"), with_think=True)["degraded"] == "timeout"
    shown = trajectory_object(_trajectory(), with_think=True)["cycles"][1]
    assert (shown["think"], shown["text"]) == ("12*9=108", "108")


def test_reasoning_tokens_are_all_but_the_returned_answers():
    assert _trajectory().reasoning_tokens == 20 + 10 - 5
    assert _trajectory(selected=None).reasoning_tokens == 30


_LAST = {"role": "assistant", "content": "<think>1"}
_CHAT, _RESPONSES = "/v1/chat/completions", "/v1/responses"


@pytest.mark.parametrize(
    ("path", "request_", "prefix"),
    [
        (_CHAT, {"messages": [_LAST], "continue_final_message": True}, "<think>1"),
        (_CHAT, {"messages": [_LAST], "continue_final_message": "yes"}, "<think>1"),  # a bool to vLLM
        (_CHAT, {"messages": [_LAST], "continue_final_message": "perhaps"}, ""),
        (_CHAT, {"messages": [_LAST]}, ""),
        (
            _CHAT,
            {
                "messages": [{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"text": "b"}, 3]}],
                "continue_final_message": True,
            },
            "ab",
        ),
        (_CHAT, {"messages": [], "continue_final_message": True}, ""),
        (_CHAT, {"messages": "hello", "continue_final_message": True}, ""),
        (_CHAT, {"messages": [{"role": "assistant"}], "continue_final_message": True}, ""),
        (_CHAT, {"messages": ["x"], "continue_final_message": True}, ""),
        ("/v1/messages", {"messages": [_LAST], "continue_final_message": True}, ""),  # which vLLM ignores there
        (
            _RESPONSES,
            {"input": [{"type": "message", "status": "incomplete", "content": [{"type": "output_text", "text": "1"}]}]},
            "1",
        ),
        (_RESPONSES, {"input": [_LAST | {"status": "completed"}]}, ""),
        (_RESPONSES, {"input": "hello"}, ""),
        (_RESPONSES, {"input": [{"type": "reasoning", "status": "incomplete", "content": "x"}]}, ""),
    ],
)
def test_the_prefix_is_the_message_to_go_on_with(path, request_, prefix):
    assert continued_text(path, request_) == prefix


@pytest.mark.parametrize(
    ("request_", "options", "tokens"),
    [
        ({}, None, 1000),
        ({"max_tokens": 50}, None, 50),
        ({"max_tokens": 50, "max_completion_tokens": 40}, None, 40),
        ({"max_output_tokens": 30}, None, 30),
        ({"max_tokens": 5000}, None, 1000),
        ({"max_tokens": "50", "n": "3"}, None, 150),  # vLLM takes these for numbers
        ({"max_tokens": None, "n": None}, None, 1000),
        ({"max_tokens": -5, "n": 0}, None, 1),
        ({"max_tokens": [], "n": {}}, None, 1000),
        ({"max_tokens": 10, "n": 2}, {"policy": "vote", "samples": 5}, 100),
        ({"max_tokens": 10}, {"policy": "vote"}, 80),
        ({"max_tokens": 10}, {"policy": "single", "samples": 5}, 10),
        ({"max_tokens": 10, "prompt": ["a", "b", "c"]}, None, 30),
        ({"max_tokens": 10, "prompt": [[1, 2], [3]]}, None, 20),
        ({"max_tokens": 10, "prompt": [1, 2, 3]}, None, 10),
        ({"max_tokens": 10, "prompt": []}, None, 10),
    ],
)
def test_tokens_that_a_request_may_generate(request_, options, tokens):
    state = RequestState(fields=request_, limits=_limits(RtapOptions(**(options or {}))))
    assert read_demand(state, "/v1/completions", max_model_len=1000).tokens == tokens


@pytest.mark.parametrize(
    ("request_", "options", "trajectories"),
    [
        ({}, None, 1),
        ({"prompt": ["hi"] * 64, "n": 16}, {"policy": "vote", "samples": 32}, 32_768),
        ({"prompt": ["hi"] * 64, "n": 16}, {"policy": "single", "samples": 32}, 1024),
        ({"prompt": [1, 2, 3], "n": "2"}, None, 2),
        ({"prompt": "hi", "n": None}, {"policy": "vote"}, 8),
    ],
)
def test_trajectories_are_prompts_times_choices_times_samples(request_, options, trajectories):
    state = RequestState(fields=request_, limits=_limits(RtapOptions(**(options or {}))))
    assert read_demand(state, "/v1/completions", max_model_len=1000).trajectories == trajectories


def test_a_server_whose_policy_is_vote_generates_samples_for_everyone():
    settings = Settings(policy=Policy.VOTE, samples=4)
    vote, model = _limits(RtapOptions(), settings), _limits(RtapOptions(policy=Policy.MODEL), settings)
    for limits, samples in ((vote, 4), (model, 1), (None, 1)):
        state = RequestState(fields={"max_tokens": 10}, limits=limits)
        assert read_demand(state, "/v1/completions", max_model_len=1000) == Demand(samples, 10 * samples)


@given(
    per_minute=st.integers(1, 100_000), n=st.integers(1, 16), given_tokens=st.none() | st.integers(1, 50_000),
    max_model_len=st.integers(1, 200_000),
)  # fmt: skip
def test_a_limited_key_reserves_what_its_request_may_generate(per_minute, n, given_tokens, max_model_len):
    state = RequestState(fields={"n": n, "max_tokens": given_tokens}, tokens_per_minute=per_minute)
    demand = read_demand(state, "/v1/completions", max_model_len=max_model_len)
    if given_tokens is not None:
        assert state.max_tokens is None
        assert demand.tokens == n * min(given_tokens, max_model_len)
    else:  # within the key's minute, but for one token of each choice
        assert n * state.max_tokens <= max(n, per_minute)
        assert demand.tokens <= max(n, per_minute)


@pytest.mark.parametrize("raw", [{"policy": "C" * 5000}, {"C" * 5000: 1}, {"threshold": ["C"] * 5000}])
def test_an_error_does_not_repeat_a_long_value(raw):
    with pytest.raises(InvalidRequest) as refused:
        parse_options({"rtap": raw}, SETTINGS)
    assert len(str(refused.value)) < 500
    assert len(refused.value.param or "") < 150
