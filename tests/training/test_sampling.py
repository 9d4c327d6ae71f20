"""Batched sampling: padding and dropping finished rows change nothing, and log-probabilities are the model's."""

import pytest
import torch

from rtap_core.errors import ConfigError
from rtap_training.config.settings import SamplerKind
from rtap_training.rl.lockstep import Request
from rtap_training.sampling.samplers import TransformersSampler, sample_until, sampler_kind
from tests.training.demo import MODELS, encode_question, load_policy

NO_END = frozenset[int]()


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)  # two would wait for each other where the machine is busy
    return load_policy(MODELS / "student")[0]


def requests_of(*limits: int) -> list[Request]:
    texts = ("1", "make 82", "make 82 from 3, 7, 25", "12*9?")
    return [Request(i, encode_question(text), limit) for i, (text, limit) in enumerate(zip(texts, limits, strict=True))]


def test_a_batch_gives_what_each_prompt_gives_alone(model) -> None:
    requests = requests_of(40, 40, 40, 9)
    alone = [sample_until(model, [r], NO_END, random=None)[0] for r in requests]
    # Rows that would stop early leave the batch while the others go on.
    ends = frozenset({alone[0].ids[10], alone[2].ids[20]})
    alone = [sample_until(model, [r], ends, random=None)[0] for r in requests]
    batched = sample_until(model, requests, ends, random=None)
    assert [one.ids for one in batched] == [one.ids for one in alone]
    assert any(len(one.ids) < 40 for one in batched)
    assert all(len(one.ids) <= r.max_tokens for one, r in zip(batched, requests, strict=True))
    assert all(len(one.ids) == r.max_tokens or one.ids[-1] in ends for one, r in zip(batched, requests, strict=True))


def test_log_probabilities_are_those_of_the_model(model) -> None:
    requests = requests_of(6, 12, 20, 12)
    for request, one in zip(requests, sample_until(model, requests, NO_END, random=None), strict=True):
        with torch.inference_mode():
            logps = model(input_ids=torch.tensor([[*request.prompt_ids, *one.ids]])).logits[0].log_softmax(-1)
        start = len(request.prompt_ids) - 1
        assert one.logps == pytest.approx([logps[start + i, token].item() for i, token in enumerate(one.ids)], abs=1e-4)


def test_equal_seeds_give_equal_samples_in_the_order_of_the_requests(model) -> None:
    sampler = TransformersSampler(lambda: model, NO_END, batch_rows=3)
    requests = [*requests_of(5, 8, 12, 6), *requests_of(5, 8, 12, 6)]
    runs = []
    for seed in (3, 3, 4):
        sampler.seed(seed)
        runs.append([one.ids for one in sampler.generate(requests)])
    assert runs[0] == runs[1] != runs[2]
    assert [len(ids) for ids in runs[0]] == [r.max_tokens for r in requests]
    assert runs[0][:4] != runs[0][4:]


def test_a_model_is_loaded_only_where_something_is_sampled() -> None:
    sampler = TransformersSampler(lambda: pytest.fail("loaded"), NO_END, batch_rows=3)
    sampler.seed(1)
    sampler.close()


def test_vllm_is_the_samplers_choice_on_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    installed, gpu = [object()], [True]
    monkeypatch.setattr("importlib.util.find_spec", lambda _: installed[0])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu[0])
    assert sampler_kind(SamplerKind.AUTO) is SamplerKind.VLLM
    gpu[0] = False
    assert sampler_kind(SamplerKind.AUTO) is SamplerKind.TRANSFORMERS
    assert sampler_kind(SamplerKind.VLLM) is SamplerKind.VLLM
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="vLLM samples in a single process"):
        sampler_kind(SamplerKind.VLLM)
    installed[0] = None
    with pytest.raises(ConfigError, match="sampler=vllm needs vLLM"):
        sampler_kind(SamplerKind.VLLM)
