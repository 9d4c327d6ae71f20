"""Batched sampling: padding and dropping finished rows change nothing, and the next cycle is forced open."""

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from server.rtap.format import RTAP
from training.config import SftConfig
from training.policy import build_policy
from training.rollout import MAX_CYCLE_TOKENS, Trajectory, encode_question, sample_trajectories, sample_until
from training.tokenizer import build_tokenizer, token_id


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(["make 82 from 3, 7, 25 user assistant"] * 10, vocab_size=300, max_length=1024)


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    shape = SftConfig(hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, ffn_size=64)
    return build_policy(shape, tokenizer).eval()


def test_a_batch_gives_what_each_prompt_gives_alone(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts = [encode_question(tokenizer, text) for text in ("1", "make 82", "make 82 from 3, 7, 25", "12*9?")]
    alone = [sample_until(model, [p], (5, 6), generator=None)[0] for p in prompts]
    # Rows that would stop early are dropped from the batch while the others go on.
    stops = (alone[0][10], alone[2][20])
    alone = [sample_until(model, [p], stops, generator=None)[0] for p in prompts]
    assert sample_until(model, prompts, stops, generator=None) == alone
    assert any(len(ids) < MAX_CYCLE_TOKENS for ids in alone)


def test_equal_generators_give_equal_samples(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = [encode_question(tokenizer, "12*9")] * 4
    first, second = (sample_until(model, prompts, (5,), generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert first == second
    assert first[0] != first[1]


def test_the_next_cycle_continues_the_ids_and_is_forced_open(tokenizer: PreTrainedTokenizerFast) -> None:
    trajectory = Trajectory(0, [1, 2])
    cycle_open = token_id(tokenizer, RTAP.cycle_open)
    assert trajectory.context(cycle_open) == [1, 2]


def test_a_cut_cycle_has_no_answer_and_ends_the_trajectory(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    trajectories = sample_trajectories(
        model, tokenizer, ["12*9", "3+4"], lambda *_: True, samples=2, max_cycles=3,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert [t.question for t in trajectories] == [0, 0, 1, 1]
    for trajectory in trajectories:
        assert len(trajectory.cycles) == 1  # an untrained model closes no answer
        assert trajectory.cycles[0].answer is None
        assert not trajectory.cycles[0].is_right
