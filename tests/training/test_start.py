"""The demo's untrained model and its training texts."""

import json
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rtap_training.__main__ import main
from rtap_training.bundled.start import group_by_length, split_text
from rtap_training.bundled.tokenizer import TAGS, render_prompt
from rtap_training.checkpoint import MANIFEST
from rtap_training.config.sft import SftConfig
from rtap_training.models.loading import load_dialect
from rtap_training.sft import build_rows
from rtap_training.tasks import TASKS
from rtap_training.tasks.trajectory import sample_conversation

BUNDLED_POLICY = Path(__file__).parents[2] / "deploy" / "models" / "policy"
WEIGHTS = {"countdown": 0.4, "arithmetic": 0.2, "knights": 0.4}
TINY = ["--hidden-size", "32", "--num-layers", "2", "--num-heads", "2", "--num-kv-heads", "1", "--ffn-size", "64"]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("models") / "start"
    assert main(["demo-start", "--output", str(output), "--num-texts", "3000", *TINY]) == 0
    return output


def test_the_checkpoint_is_complete_and_has_random_weights(start: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(start), AutoTokenizer.from_pretrained(start)
    bundled = json.loads((BUNDLED_POLICY / "config.json").read_text())
    assert model.config.rtap == bundled["rtap"] == {"format": "rtap"}
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(BUNDLED_POLICY).chat_template
    assert len(tokenizer) == model.config.vocab_size == 448
    assert all(len(tokenizer.encode(tag)) == 1 for tag in TAGS)
    with torch.inference_mode():
        logps = model(torch.tensor([tokenizer.encode("1+1=2")])).logits.log_softmax(-1)
    assert -6.8 < logps.mean() < -5.6  # log(448) = 6.1
    assert json.loads((start / MANIFEST).read_text())["figures"] == {
        "texts": 3000, "parameters": model.num_parameters()
    }  # fmt: skip


def test_the_same_seed_gives_the_same_files(start: Path, tmp_path: Path) -> None:
    flags = ["demo-start", "--num-texts", "3000", *TINY, "--output"]
    assert main([*flags, str(tmp_path / "again")]) == 0
    assert main([*flags, str(tmp_path / "other"), "--seed", "2"]) == 0
    for name in ("model.safetensors", "texts.jsonl", "tokenizer.json"):
        content = (start / name).read_bytes()
        assert content == (tmp_path / "again" / name).read_bytes()
        assert content != (tmp_path / "other" / name).read_bytes()


def test_the_completion_is_what_follows_the_last_masked_segment() -> None:
    rng = Random(5)
    conversations = [sample_conversation(TASKS, WEIGHTS, rng) for _ in range(300)]
    for conversation in conversations:
        prompt, completion = split_text(conversation)
        turn = "".join(segment.text for segment in conversation.turn)
        assert prompt + completion == render_prompt(conversation.messages) + turn
        masked = [index for index, segment in enumerate(conversation.turn) if not segment.is_trained]
        trained = conversation.turn[masked[-1] + 1 :] if masked else conversation.turn
        assert completion == "".join(segment.text for segment in trained)
    assert sum(any(not segment.is_trained for segment in c.turn) for c in conversations) > 60


def test_texts_of_similar_length_are_neighbours_and_none_is_lost() -> None:
    rng = Random(3)
    pairs = [("a" * rng.randint(1, 40), "b" * rng.randint(1, 40)) for _ in range(103)]
    grouped = group_by_length(pairs, 10, Random(1))
    assert sorted(grouped) == sorted(pairs)
    lengths = [[len(prompt + completion) for prompt, completion in grouped[i : i + 10]] for i in range(0, 100, 10)]
    spans = sorted((min(group), max(group)) for group in lengths)
    assert all(longest <= shortest for (_, longest), (shortest, _) in pairwise(spans))
    assert lengths != sorted(lengths)


def test_a_split_text_has_the_tokens_of_the_whole_text(start: Path) -> None:
    """As an engine reads it, and without a token more."""
    _, tokenizer, dialect = load_dialect(start)
    file = start / "texts.jsonl"
    rows, _ = build_rows(SftConfig(policy=str(start), data=str(file)), tokenizer, dialect)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == len(lines) == 3000
    for row, line in zip(rows, lines, strict=True):
        assert list(row.ids) == dialect.encode(line["prompt"] + line["completion"])
        assert dialect.decode(row.ids[row.num_context :]) == line["completion"]


def test_a_student_shares_its_teachers_token_ids(tmp_path: Path) -> None:
    flags = ["--num-texts", "4", *TINY, "--tokenizer", str(BUNDLED_POLICY)]
    assert main(["demo-start", "--output", str(tmp_path / "student"), *flags]) == 0
    student, teacher = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "student", BUNDLED_POLICY))
    assert student.get_vocab() == teacher.get_vocab()
    assert student.chat_template == teacher.chat_template


def test_a_tokenizer_that_cannot_write_cycles_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["demo-start", "--output", str(tmp_path / "student"), "--num-texts", "4", "--tokenizer", str(tmp_path)]
    assert main(flags) == 2
    assert "has no tokenizer" in capsys.readouterr().err
    text = (BUNDLED_POLICY / "tokenizer.json").read_text().replace("</answer>", "</result>")
    (tmp_path / "tokenizer.json").write_text(text)
    (tmp_path / "tokenizer_config.json").write_text((BUNDLED_POLICY / "tokenizer_config.json").read_text())
    assert main(flags) == 2
    assert "lacks the tokens </answer>" in capsys.readouterr().err
