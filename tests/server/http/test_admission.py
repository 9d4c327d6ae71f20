"""Limits of a key and of the server: laws of the bucket, and what is refused when."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtap_core.errors import InvalidRequest, Overloaded, RateLimited
from rtap_server.http.admission import Account, Admission, Bucket, Demand, KeyLimits

STEPS = st.lists(st.tuples(st.floats(0, 300), st.integers(0, 5_000)), max_size=40)


@given(rate=st.integers(1, 10_000), steps=STEPS)
def test_a_bucket_gives_what_it_had_and_what_came_since_never_more(rate, steps):
    bucket, now, taken = Bucket(rate), 0.0, 0
    for seconds, amount in steps:
        now += seconds
        if bucket.level(now) >= amount:
            bucket.take(amount, now)
            taken += amount
        assert -1e-6 <= bucket.level(now) <= rate
    assert taken <= rate + rate * now / 60 + 1e-6


@given(rate=st.integers(1, 10_000), overdrawn=st.integers(0, 100_000), level=st.integers(0, 1))
def test_a_bucket_has_what_is_waited_for_when_it_says_so(rate, overdrawn, level):
    bucket = Bucket(rate)
    bucket.take(rate + overdrawn, 5.0)
    wait = bucket.seconds_until(level, 5.0)
    assert bucket.level(5.0 + wait) == pytest.approx(level, abs=1e-6)
    assert wait == pytest.approx((overdrawn + level) * 60 / rate)


@given(rate=st.integers(1, 100), seconds=st.lists(st.floats(0, 20), max_size=60))
def test_who_comes_again_when_told_is_let_in(rate, seconds):
    account, now = Account("k", KeyLimits(requests_per_minute=rate, tokens_per_minute=rate)), 0.0
    waits = list[int]()
    for step in seconds:
        now += step
        try:
            usage = account.enter(now)
        except RateLimited as refused:
            now += refused.retry_after_seconds
            waits.append(refused.retry_after_seconds)
            usage = account.enter(now)
        usage.leave(7, now)
    assert account.in_flight == 0
    assert all(wait >= 1 for wait in waits)


def test_requests_of_a_minute_and_then_one_when_one_has_come():
    account = Account("team a", KeyLimits(requests_per_minute=2))
    for _ in range(2):
        account.enter(0.0).leave(1_000_000, 0.0)
    with pytest.raises(
        RateLimited, match=r"^API key 'team a' is limited to 2 requests per minute; retry in 30 s$"
    ) as told:
        account.enter(0.0)
    assert told.value.retry_after_seconds == 30
    account.enter(30.0)


def test_tokens_are_charged_afterwards_and_waited_for():
    account = Account("k", KeyLimits(tokens_per_minute=60))
    account.enter(0.0).leave(60, 0.0)
    account.enter(0.0).leave(90, 0.0)  # nothing was left, but nothing was owed
    with pytest.raises(RateLimited, match="60 tokens per minute") as told:
        account.enter(0.0)
    assert told.value.retry_after_seconds == 90
    account.enter(90.0)


def test_so_many_at_a_time_and_a_refusal_takes_nothing():
    account = Account("k", KeyLimits(requests_per_minute=3, concurrent=2))
    account.enter(0.0)
    usage = account.enter(0.0)
    for _ in range(5):
        with pytest.raises(RateLimited, match="2 requests in flight") as told:
            account.enter(0.0)
        assert told.value.retry_after_seconds == 1
    usage.leave(0, 0.0)
    account.enter(0.0)  # the third of three
    assert account.in_flight == 2


@given(steps=st.lists(st.tuples(st.integers(1, 150), st.integers(0, 200), st.floats(0, 30)), max_size=30))
def test_a_key_generates_no_more_than_its_bucket_gave(steps):
    """Each request generates at most what it reserved; whatever it did not use is given back."""
    account, now, generated = Account("k", KeyLimits(tokens_per_minute=100)), 0.0, 0
    for reserved, used, seconds in steps:
        now += seconds
        usage = account.enter(now)
        try:
            usage.reserve(reserved, now)
        except InvalidRequest:
            assert reserved > 100
            usage.leave(0, now)
        except RateLimited as refused:
            usage.leave(0, now)
            account.enter(now + refused.retry_after_seconds).leave(0, now)
        else:
            used = min(used, reserved)
            usage.leave(used, now)
            generated += used
    assert account.in_flight == 0
    assert generated <= 100 + 100 * now / 60 + 1e-6


def test_concurrent_requests_cannot_spend_the_same_tokens():
    account = Account("k", KeyLimits(tokens_per_minute=100))
    first, second = account.enter(0.0), account.enter(0.0)
    first.reserve(60, 0.0)
    with pytest.raises(RateLimited, match="100 tokens per minute; retry in 12 s"):
        second.reserve(60, 0.0)
    with pytest.raises(InvalidRequest, match="may generate 101 tokens, above the 100 tokens per minute of API key 'k'"):
        second.reserve(101, 0.0)
    first.leave(10, 0.0)
    second.reserve(60, 0.0)


@given(demands=st.lists(st.tuples(st.integers(1, 8), st.integers(1, 150)), max_size=30))
def test_admission_is_never_above_its_limits_and_ends_at_nothing(demands):
    admission, held = Admission(5, tokens=100), []
    for trajectories, tokens in demands:
        before = admission.trajectories_in_flight, admission.tokens_in_flight
        context = admission.admit(Demand(trajectories, tokens))
        try:
            context.__enter__()
        except Overloaded:
            assert held
            assert before[0] + trajectories > 5 or before[1] + tokens > 100
            held.pop().__exit__(None, None, None)
            continue
        held.append(context)
        alone = len(held) == 1
        assert alone or (admission.trajectories_in_flight <= 5 and admission.tokens_in_flight <= 100)
    for context in held:
        context.__exit__(None, None, None)
    assert (admission.requests_in_flight, admission.trajectories_in_flight, admission.tokens_in_flight) == (0, 0, 0)


def test_an_error_inside_frees_the_place():
    admission = Admission(1)

    def fail() -> None:
        with admission.admit(Demand(tokens=10**9)):
            with pytest.raises(Overloaded, match="limit of 1 requests in flight") as told:
                admission.check()
            assert told.value.retry_after_seconds >= 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    admission.check()


def test_more_trajectories_than_one_request_may_have_are_no_overload():
    admission = Admission(5, per_request=4)
    refused = pytest.raises(
        InvalidRequest, match=r"asks for 32768 trajectories \(prompts x n x samples\), above .* of 4;"
    )
    with refused, admission.admit(Demand(32_768, 10)):
        pass
    assert admission.requests_in_flight == 0


def test_a_context_that_is_never_entered_counts_nothing():
    admission = Admission(1)
    admission.admit(Demand())
    with admission.admit(Demand()):
        assert admission.requests_in_flight == 1
