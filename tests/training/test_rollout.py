"""Batched sampling: padding and dropping finished rows change nothing, and the next cycle is forced open."""

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from rtap_core.errors import ConfigError
from rtap_core.format import RTAP
from rtap_training.bundled.architecture import build_policy
from rtap_training.bundled.config import Architecture
from rtap_training.bundled.tokenizer import build_tokenizer
from rtap_training.config import SamplerKind
from rtap_training.huggingface import token_id
from rtap_training.rollout import (
    MAX_CYCLE_TOKENS,
    Trajectory,
    TransformersSampler,
    encode_question,
    sample_trajectories,
    sample_until,
    sampler_kind,
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(["make 82 from 3, 7, 25 user assistant"] * 10, vocab_size=300, max_length=1024)


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # two would wait for each other where the machine is busy
    shape = Architecture(hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, ffn_size=64)
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
        TransformersSampler(model).seeded(0), tokenizer, ["12*9", "3+4"], lambda *_: True,
        samples=2, max_cycles=3, max_positions=1024,
    )  # fmt: skip
    assert [t.question for t in trajectories] == [0, 0, 1, 1]
    for trajectory in trajectories:
        assert len(trajectory.cycles) == 1  # an untrained model closes no answer
        assert trajectory.cycles[0].answer is None
        assert not trajectory.cycles[0].is_right


def test_vllm_is_the_samplers_choice_on_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    installed, gpu = [object()], [True]
    monkeypatch.setattr("importlib.util.find_spec", lambda _: installed[0])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu[0])
    assert sampler_kind(SamplerKind.AUTO) is SamplerKind.VLLM
    gpu[0] = False
    assert sampler_kind(SamplerKind.AUTO) is SamplerKind.TRANSFORMERS
    assert sampler_kind(SamplerKind.VLLM) is SamplerKind.VLLM
    installed[0] = None
    with pytest.raises(ConfigError, match="sampler=vllm needs vLLM"):
        sampler_kind(SamplerKind.VLLM)


def test_no_cycle_is_begun_where_it_might_not_fit(tokenizer: PreTrainedTokenizerFast) -> None:
    """Positions for two cycles and a little: a policy that is always wrong writes two of four."""
    ids = tokenizer.backend_tokenizer.encode(RTAP.render_cycle("1", "1"), add_special_tokens=False).ids
    prompt = len(encode_question(tokenizer, "12*9"))
    (trajectory,) = sample_trajectories(
        lambda prompts, _: [ids if len(p) == prompt else ids[1:] for p in prompts], tokenizer, ["12*9"],
        lambda *_: False, samples=1, max_cycles=4, max_positions=prompt + 2 * len(ids) + MAX_CYCLE_TOKENS,
    )  # fmt: skip
    assert [c.answer for c in trajectory.cycles] == ["1", "1"]
    assert [list(c.ids) for c in trajectory.cycles] == [ids, ids]
