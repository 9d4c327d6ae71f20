"""The tests of test_chat.py on a policy and a generator of the `think` format (Qwen3, DeepSeek: no answer tags)."""

from collections.abc import Iterator

import pytest

from tests.e2e.conftest import Running, free_port, rtap_command, running
from tests.e2e.test_chat import (
    test_a_deadline_returns_the_best_so_far,
    test_a_grammar_binds_every_answer_and_no_thought,
    test_a_stream_has_the_same_content_as_the_whole_reply,
    test_an_answer_with_its_trajectory,
    test_cycle_events_come_as_cycles_end_and_before_any_content,
    test_logprobs_are_those_of_the_content,
    test_max_tokens_is_one_budget_and_finish_reason_says_so,
    test_n_choices_are_independent_trajectories,
    test_policies,
    test_the_cache_makes_later_cycles_cheap,
    test_the_same_seed_gives_the_same_trajectory_and_another_seed_another,
    test_thinking_streams_token_by_token,
)
from tests.other_checkpoints import save_think

__all__ = [
    "test_a_deadline_returns_the_best_so_far",
    "test_a_grammar_binds_every_answer_and_no_thought",
    "test_a_stream_has_the_same_content_as_the_whole_reply",
    "test_an_answer_with_its_trajectory",
    "test_cycle_events_come_as_cycles_end_and_before_any_content",
    "test_logprobs_are_those_of_the_content",
    "test_max_tokens_is_one_budget_and_finish_reason_says_so",
    "test_n_choices_are_independent_trajectories",
    "test_policies",
    "test_the_cache_makes_later_cycles_cheap",
    "test_the_same_seed_gives_the_same_trajectory_and_another_seed_another",
    "test_thinking_streams_token_by_token",
]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder, port = tmp_path_factory.mktemp("think"), free_port()
    flags = [
        str(save_think("policy", folder / "policy")), "--served-model-name", "rtap",
        "--confidence-model", str(save_think("confidence", folder / "confidence")),
        "--enforce-eager", "--kv-cache-memory-bytes", str(2**29),
    ]  # fmt: skip
    with running(rtap_command(port, *flags), port, "/ready", folder) as started:
        yield started
