"""Labels, contrast and losses of generator training."""

from dataclasses import replace
from math import log

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from rtap_core.artifact import Logistic
from rtap_core.errors import ConfigError
from rtap_core.features import logprob_features
from rtap_core.format import RTAP
from rtap_training.bundled.architecture import build_policy
from rtap_training.bundled.classifier import body_of, build_generator, build_scratch, confidences
from rtap_training.bundled.confidence import balanced_loss, label, pairwise_loss
from rtap_training.bundled.config import Architecture, ConfidenceConfig, Loss
from rtap_training.bundled.judging import (
    ALONE,
    GENERATOR,
    LOGPROB_RULES,
    CycleScores,
    judge_task,
    logprob_scores,
    report,
    score_cycles,
)
from rtap_training.bundled.own_cycles import PolicySetup, training_problems
from rtap_training.bundled.tokenizer import TAGS, build_tokenizer
from rtap_training.examples import Example
from rtap_training.huggingface import encode_text, token_id
from rtap_training.rollout import SampledCycle, Trajectory

CONFIG = ConfidenceConfig(questions=10, synthetic_pairs=0, validation_share=0.2)


@pytest.fixture(scope="module")
def asked() -> PolicySetup[ConfidenceConfig]:
    tokenizer = build_tokenizer(["make 82 from 3, 7, 25 user assistant"] * 10, vocab_size=300, max_length=1024)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # two would wait for each other where the machine is busy
    shape = Architecture(hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, ffn_size=64)
    return PolicySetup(build_policy(shape, tokenizer).eval(), tokenizer, CONFIG)


def cycle(tokenizer: PreTrainedTokenizerFast, text: str, right: bool | None) -> SampledCycle:
    ids = tuple(encode_text(tokenizer, RTAP.render_cycle(text, text)))
    return SampledCycle(ids, None if right is None else text, bool(right))


def sampled(asked: PolicySetup[ConfidenceConfig], rights: list[list[bool | None]]) -> list[Trajectory]:
    """One single-cycle trajectory per entry; None: truncated."""
    return [
        Trajectory(question, [1, 2, question], [cycle(asked.tokenizer, f"{place}{right}", right)], is_open=False)
        for question, row in enumerate(rights)
        for place, right in enumerate(row)
    ]


@pytest.mark.parametrize(
    ("rights", "message"),
    [
        ([[None]] * 10, "finished no cycle of 10 questions"),
        ([[True, True]] * 10, "4 of 4 distinct answers to the validation questions are right.*calibrate"),
        ([[False, None]] * 10, "0 of 2 distinct answers to the validation questions are right.*calibrate"),
        ([[True, False]] * 2 + [[True]] * 8, "8 of 8 distinct answers to the training questions.*nothing to learn"),
        ([[True, False]] * 2 + [[None]] * 8, "0 of 0 distinct answers to the training questions.*nothing to learn"),
    ],
)
def test_data_without_contrast_is_refused(
    asked: PolicySetup[ConfidenceConfig], rights: list[list[bool | None]], message: str
) -> None:
    problems, questions = training_problems(CONFIG)
    with pytest.raises(ConfigError, match=message):
        label(asked, problems, questions, sampled(asked, rights))


def test_pairs_need_a_question_with_both(asked: PolicySetup[ConfidenceConfig]) -> None:
    problems, questions = training_problems(CONFIG)
    rights: list[list[bool | None]] = [[True, False]] * 2 + [[True]] * 4 + [[False]] * 4
    assert len(label(asked, problems, questions, sampled(asked, rights))) == 8
    pairwise = replace(asked, config=replace(CONFIG, loss=Loss.PAIRWISE))
    with pytest.raises(ConfigError, match="no question has right and wrong answers to pair"):
        label(pairwise, problems, questions, sampled(asked, rights))


def test_losses_by_hand() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, 3.0])
    assert pairwise_loss(logits).item() == pytest.approx((log(1 + 2.718281828**-1) + log(1 + 2.718281828**3)) / 2)
    batch = [Example(0, (1,), True, 1, 0.5), Example(0, (2,), False, 1, 1.5)]
    expected = (0.5 * log(1 + 2.718281828**-2) + 1.5 * log(1 + 2.718281828**1)) / 2
    assert balanced_loss(logits[:2], batch, 1.0).item() == pytest.approx(expected)


def test_the_level_of_a_question_moves_only_the_balanced_loss() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, 3.0])
    assert pairwise_loss(logits + 5).item() == pytest.approx(pairwise_loss(logits).item())


def test_a_generator_starts_from_the_policy_or_from_nothing(asked: PolicySetup[ConfidenceConfig]) -> None:
    def first(model: torch.nn.Module) -> Tensor:
        return model.state_dict()["layers.0.mlp.up_proj.weight"]

    policy = first(asked.policy.model)
    assert first(body_of(build_generator(asked.policy, asked.tokenizer))).equal(policy)
    scratch = build_scratch(asked.policy)
    assert first(body_of(scratch)).shape == policy.shape
    assert not first(body_of(scratch)).equal(policy)


def test_a_generator_may_have_only_the_first_layers_of_the_policy(asked: PolicySetup[ConfidenceConfig]) -> None:
    model = build_generator(asked.policy, asked.tokenizer, 1)
    assert model.config.num_hidden_layers == len(model.config.layer_types) == len(body_of(model).layers) == 1
    assert body_of(model).layers[0].state_dict().keys() == asked.policy.model.layers[0].state_dict().keys()
    assert body_of(model).norm.weight.equal(asked.policy.model.norm.weight)
    assert torch.isfinite(torch.tensor(confidences(model, [(1, 2, 3)], 64))).all()
    with pytest.raises(ConfigError, match="num_layers=9 is more than the policy's"):
        build_scratch(asked.policy, 9)


def test_logprob_rules_are_those_of_the_policy(asked: PolicySetup[ConfidenceConfig]) -> None:
    """Rows of different length in one batch give what each gives alone, token by token."""
    answer_open = token_id(asked.tokenizer, TAGS[2])
    rows = [([1, 2, 3], cycle(asked.tokenizer, text, True).ids) for text in ("7", "3*25+7", "82")]
    batched = logprob_scores(asked.policy, rows, answer_open, batch_tokens=4096)
    assert batched[1] == pytest.approx(logprob_scores(asked.policy, rows[1:2], answer_open, 64)[0], abs=1e-5)
    prompt, ids = rows[1]
    with torch.inference_mode():
        logits = asked.policy(input_ids=torch.tensor([[*prompt, *ids]])).logits[0].log_softmax(-1)
    logps = [logits[len(prompt) + i - 1, token].item() for i, token in enumerate(ids)]
    inside = logps[ids.index(answer_open) + 1 : -1]
    assert len(inside) == len(encode_text(asked.tokenizer, "3*25+7"))
    expected = (sum(logps) / len(logps), min(logps), sum(inside) / len(inside))
    assert [batched[1][rule] for rule in LOGPROB_RULES] == pytest.approx(expected, abs=1e-4)


def test_the_report_compares_the_generator_with_what_is_free(asked: PolicySetup[ConfidenceConfig]) -> None:
    rights: list[list[bool | None]] = [[True, False, None, False], [False, True, True, None]] * 3
    trajectories = sampled(asked, rights)
    trajectories[1].cycles.append(cycle(asked.tokenizer, "again", True))  # judged, but no first cycle
    model = build_generator(asked.policy, asked.tokenizer)
    judged = judge_task(model, asked.policy, asked.tokenizer, trajectories, 4096, Logistic(bias=0.0, generator=1.0))
    assert len(judged.scores) == 19
    rows = [(*t.prompt, *t.cycles[0].ids) for t in trajectories]
    first = confidences(model, rows, 64)
    known = [s for question in judged.first_cycles for s in question]
    assert [s.scores[GENERATOR] for s in known if s.answer] == pytest.approx(
        [c for c, t in zip(first, trajectories, strict=True) if t.cycles[0].answer], abs=1e-5
    )
    figures = report({"countdown": judged, "knights": judged})
    assert set(figures) == {"countdown", "knights", "all"}
    assert figures["all"]["cycles"] == 38
    assert figures["all"]["contrast_questions"] == 12  # equal indices of two tasks are different questions
    assert figures["all"]["choice"]["questions"] == 12
    assert set(figures["all"]["choice"]) == {"questions", "samples", "single", "any_right", "best_of_2", "best_of_4"}
    assert set(figures["countdown"]["intervals"]) == {"within_auroc", "global_auroc", "ece", "brier"}
    assert set(figures["countdown"]["first_cycles"]) == {GENERATOR, ALONE, *LOGPROB_RULES}


def test_what_the_policy_sampled_is_read_after_all_that_came_before(asked: PolicySetup[ConfidenceConfig]) -> None:
    """The opening of a later cycle is not scored: the loop writes it."""
    first, second = (cycle(asked.tokenizer, text, True) for text in ("3*25+7", "82"))
    known = score_cycles(
        build_generator(asked.policy, asked.tokenizer), asked.policy, asked.tokenizer,
        [Trajectory(0, [1, 2], [first, second], is_open=False)], 4096,
    )  # fmt: skip
    ids = [1, 2, *first.ids, *second.ids]
    with torch.inference_mode():
        logits = asked.policy(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    logps = [logits[i - 1, ids[i]].item() for i in range(1, len(ids))]
    of_second = logps[-len(second.ids) + 1 :]
    assert known.logprobs[1]["logprob_mean"] == pytest.approx(sum(of_second) / len(of_second), abs=1e-4)
    assert known.logprobs[1]["logprob_min"] == pytest.approx(min(of_second), abs=1e-4)
    assert known.logprobs[0]["logprob_mean"] == pytest.approx(sum(logps[1 : 1 + len(first.ids)]) / len(first.ids))


def test_a_fusion_finds_the_witness_that_knows_and_is_the_servers(asked: PolicySetup[ConfidenceConfig]) -> None:
    """Synthetic cycles: the generator guesses; the minimum log-probability is right three times in four."""
    rng = np.random.default_rng(0)
    right = rng.random(4000) < 0.5
    knows = rng.random(4000) < 0.75
    smallest = np.where(right == knows, -0.5, -3.0) + rng.normal(0, 0.05, 4000)
    labelled = [(Trajectory(0, []), SampledCycle((), "", bool(r))) for r in right]
    free = [{"logprob_mean": s / 10, "logprob_min": s, "logprob_answer": 0.0} for s in smallest.tolist()]
    known = CycleScores(labelled, rng.random(4000), free)
    fusion = known.fit(("generator", "logprob_mean", "logprob_min"))
    assert abs(fusion.generator) < 0.1
    fused = known.confidences(fusion)
    assert fused[smallest > -1].mean() == pytest.approx(0.75, abs=0.03)
    assert fused[smallest < -2].mean() == pytest.approx(0.25, abs=0.03)
    # The server sees tokens, not their mean and smallest.
    logprobs = [-0.1, -2.0, -0.3]
    seen = {"logprob_mean": sum(logprobs) / 3, "logprob_min": -2.0, "logprob_answer": 0.0}
    one = CycleScores(labelled[:1], np.array([0.8]), [seen])
    served = logprob_features([("", value) for value in logprobs], None)
    assert fusion.confidence(0.8, served) == pytest.approx(one.confidences(fusion)[0])
