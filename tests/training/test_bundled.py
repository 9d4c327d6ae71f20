"""The models in deploy/models do what their cards say, within the noise of a small sample."""

import json
from typing import Any

import pytest

from rtap_core.format import RTAP, parse_cycle
from rtap_training.data.questions import held_out_questions
from rtap_training.models.huggingface import load_tokenizer, token_id
from rtap_training.models.online_generator import load_online_generator, score_rows
from rtap_training.rl.lockstep import Request
from rtap_training.sampling.samplers import sample_until
from rtap_training.tasks import TASKS, check
from tests.training.demo import MODELS, decode_ids, encode_question, encode_text, load_policy

PAIRS = [  # Countdown only: in arithmetic its card promises little more than chance
    ("make 82 from 3, 7, 25", "25*3=75 75+7=82", "25*3+7", "25*3=75 75-7=68", "25*3-7"),
    ("Use 4, 9 and 6 to make 30.", "9-4=5 5*6=30", "(9-4)*6", "9+4=13 13*6=78", "(9+4)*6"),
]


def config_of(name: str) -> dict[str, Any]:
    return json.loads((MODELS / name / "config.json").read_text())


def test_they_are_small_and_bf16() -> None:
    demo = [p for name in ("policy", "confidence", "student", "eval") for p in (MODELS / name).iterdir()]
    assert sum(p.stat().st_size for p in demo) < 16 * 2**20
    assert {config_of(n)["dtype"] for n in ("policy", "confidence")} == {"bfloat16"}


def test_both_share_one_tokenizer() -> None:
    first, second = ((MODELS / name / "tokenizer.json").read_bytes() for name in ("policy", "confidence"))
    assert first == second


def test_question_files_are_what_the_command_writes() -> None:
    for name, task in TASKS.items():
        rows = [json.loads(line) for line in (MODELS / "eval" / f"{name}.jsonl").read_text().splitlines()]
        fixed = held_out_questions(task, 600)
        assert [r["question"] for r in rows] == [q.question for q in fixed]
        assert all(check(r["question"], r["answer"], r["answer"]) and r["task"] == name for r in rows)


@pytest.mark.parametrize("name", ["arithmetic", "countdown"])  # what the bundled policy was trained on
def test_greedy_answers_are_well_formed_and_often_right(name: str) -> None:
    model, tokenizer = load_policy(MODELS / "policy")
    questions = [q.question for q in held_out_questions(TASKS[name], 60)]
    requests = [Request(row, encode_question(question), 160) for row, question in enumerate(questions)]
    sampled = sample_until(model, requests, frozenset({token_id(tokenizer, RTAP.answer_close or "")}), random=None)
    answers = [parse_cycle(decode_ids(tokenizer, one.ids), RTAP)[1] for one in sampled]
    assert sum(a is not None for a in answers) >= 58
    right = sum(a is not None and TASKS[name].check(q, a) for q, a in zip(questions, answers, strict=True))
    assert right >= {"countdown": 15, "arithmetic": 45}[name]  # 28 and 56 when they were bundled


def test_the_generator_prefers_the_right_cycle_of_the_same_question() -> None:
    model, tokenizer = load_online_generator(MODELS / "confidence"), load_tokenizer(MODELS / "confidence")
    for question, right_think, right, wrong_think, wrong in PAIRS:
        prompt = encode_question(question)
        texts = (RTAP.render_cycle(right_think, right), RTAP.render_cycle(wrong_think, wrong))
        good, bad = score_rows(model, [(*prompt, *encode_text(tokenizer, text)) for text in texts])
        assert good > bad, question


def test_the_generator_block_is_complete() -> None:
    block = config_of("confidence")["rtap"]
    assert (block["format"], block["kind"]) == ("rtap", "confidence")
    assert 0 < block["threshold"] < 1
    assert sum(block["calibration"]["reference"]) == pytest.approx(1, abs=1e-3)
