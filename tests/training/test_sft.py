"""Supervised training of a Hugging Face model: its rows, and the whole command on a tiny one."""

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl.trainer.sft_config import SFTConfig as TrlConfig
from trl.trainer.sft_trainer import SFTTrainer

from rtap_core.errors import ConfigError
from rtap_training.__main__ import main
from rtap_training.config.sft import SftConfig
from rtap_training.data.trajectories import kept_trajectories
from rtap_training.models.loading import load_dialect, load_for_training
from rtap_training.sft import IGNORED, _dataset, build_corrections, build_rows
from rtap_training.supervised import trainer_arguments
from tests.training.rl.tiny import BUNDLED
from tests.training.test_generator import kept_samples, save_llama

SHORT = ["--batch-size", "4", "--micro-batch", "2", "--learning-rate", "1e-3", "--max-length", "200"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama") / "model")


def conversations(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_conversation_is_trained_on_its_last_message_and_the_end_of_the_turn(llama: Path, tmp_path: Path) -> None:
    _, tokenizer, dialect = load_dialect(llama)
    messages = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
    file = conversations(tmp_path / "c.jsonl", [{"messages": messages}])
    (row,), counts = build_rows(SftConfig(policy=str(llama), data=str(file)), tokenizer, dialect)
    assert counts == {"lines": 1, "too_long": 0}
    assert row.ids[row.num_context :] == (*dialect.encode("2"), dialect.end_of_turn_id)
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert dialect.decode(row.ids[: row.num_context]) == prompt
    (labels,) = _dataset([row])["labels"]
    assert labels == [IGNORED] * row.num_context + list(row.ids[row.num_context :])


def test_a_pair_of_texts_is_taken_as_it_is(llama: Path, tmp_path: Path) -> None:
    _, tokenizer, dialect = load_dialect(llama)
    end = tokenizer.eos_token
    texts = [("1+1=", "2"), ("1+1=", f"2{end}"), (f"<think>3</think>{end}", "<think>2</think>")]
    file = conversations(tmp_path / "c.jsonl", [{"prompt": prompt, "completion": text} for prompt, text in texts])
    rows, _ = build_rows(SftConfig(policy=str(llama), data=str(file)), tokenizer, dialect)
    for row, (prompt, text) in zip(rows, texts, strict=True):
        assert dialect.decode(row.ids[: row.num_context]) == prompt
        assert dialect.decode(row.ids[row.num_context :]) == text.removesuffix(end) + end


@pytest.mark.parametrize(
    "row",
    [
        {"messages": []},
        {"text": "x"},
        {"messages": [{"role": "user", "content": "1+1"}]},
        {"messages": [{"role": "assistant", "content": "2", "reasoning_content": "1+1"}]},
        {"prompt": "1+1"},
        {"completion": "2"},
        {"prompt": "1+1", "completion": ""},
        {"prompt": "", "completion": "2"},
        {"prompt": "1+1", "completion": 2},
        {"prompt": [{"role": "user", "content": "1+1"}], "completion": [{"role": "assistant", "content": "2"}]},
        3,
    ],
)
def test_a_line_that_is_no_row_is_named(llama: Path, tmp_path: Path, row: Any) -> None:
    _, tokenizer, dialect = load_dialect(llama)
    file = conversations(tmp_path / "c.jsonl", [row])
    with pytest.raises(ConfigError, match=r"c\.jsonl:1: not a row \(.*; a line is"):
        build_rows(SftConfig(policy=str(llama), data=str(file)), tokenizer, dialect)


def test_a_correction_trains_a_right_cycle_after_a_wrong_one_with_its_opening(llama: Path, tmp_path: Path) -> None:
    *_, dialect = load_dialect(llama)
    config = SftConfig(policy=str(llama), samples_file=kept_samples(tmp_path / "s.jsonl"), rows_per_question=2)
    once = config.samples_file.read_text()
    config.samples_file.write_text(once + once.replace("so ", "thus "))  # two right samples of each question
    samples = [rows for _, rows in kept_trajectories(dialect, tmp_path / "s.jsonl")]
    found = build_corrections(samples, dialect, config, Random(0))
    right = {turn.cycles[0].ids for turns in samples for turn in turns if turn.is_right}
    wrong = {turn.cycles[0].ids for turns in samples for turn in turns if not turn.is_right}
    opening = dialect.encode(dialect.format.cycle_open)
    assert all(found.values())
    for kind, firsts in (("corrected", wrong), ("confirmed", right)):
        for row in found[kind]:
            context, written = row.ids[: row.num_context], row.ids[row.num_context : -1]
            if kind == "confirmed":  # only a server opens a cycle after a right answer
                assert list(context[-len(opening) :]) == opening
                context, written = context[: -len(opening)], (*opening, *written)
            assert any(context[-len(first) :] == first for first in firsts)
            assert written in right  # the opening has the tag that begins a thought
            assert row.ids[-1] == dialect.end_of_turn_id


def test_a_row_is_what_reaches_the_loss(llama: Path, tmp_path: Path) -> None:
    """TRL's collator keeps our labels, and rows above the length are left out, not cut."""
    _, tokenizer, dialect = load_dialect(llama)
    words = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2 \u2028 and more " * 5}]
    rows = [{"messages": words}, {"messages": [words[0], words[1] | {"content": "2" * 500}]}]
    file = tmp_path / "c.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    config = SftConfig(policy=str(llama), data=str(file), max_length=200, output=tmp_path / "o")
    (row,), counts = build_rows(config, tokenizer, dialect)
    assert counts == {"lines": 1, "too_long": 1}
    loaded = load_for_training(llama)
    trainer = SFTTrainer(
        model=loaded.model,
        args=trainer_arguments(TrlConfig, config, max_length=200),
        train_dataset=_dataset([row]),
        processing_class=loaded.processor,
    )
    (batch,) = trainer.get_train_dataloader()
    assert batch["input_ids"][0].tolist() == list(row.ids)
    assert (batch["labels"][0] == IGNORED).sum() == row.num_context


def test_right_samples_alone_are_imitation(llama: Path, tmp_path: Path) -> None:
    _, tokenizer, dialect = load_dialect(llama)
    samples = kept_samples(tmp_path / "s.jsonl", questions=30)
    config = SftConfig(policy=str(llama), data="right", samples_file=samples)
    rows, counts = build_rows(config, tokenizer, dialect)
    assert counts["right"] == len(rows) < 30  # a tenth of the questions is held out
    right = {str(json.loads(line)["text"]) for line in samples.read_text().splitlines()[::2]}
    for row in rows:
        assert any(text in dialect.decode(row.ids[row.num_context :]) for text in right)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"data": "corrections"}, "with questions to sample or with a samples_file"),
        ({"data": "c.jsonl", "samples_file": Path("s.jsonl")}, "a file of conversations alone"),
        ({"data": "c.jsonl", "teacher": "someone/model"}, "teacher=someone/model is sampled on questions"),
        ({"data": "c.jsonl", "prompt": "{question}!"}, "prompt is for questions"),
        ({"data": "c.jsonl", "merge": True}, "merge needs lora_rank"),
        ({"data": "c.jsonl", "matrix_rate": 0.1, "lora_rank": 2}, "leave out lora_rank=2"),
        ({"data": "c.jsonl", "matrix_rate": -0.1}, "matrix_rate=-0.1 must be at least 0"),
        ({"data": "c.jsonl", "micro_batch": 5}, "must divide"),
        ({"data": "c.jsonl", "trainer": "[]"}, "must be a JSON object"),
        ({"data": "c.jsonl", "trainer": "{"}, "is not JSON"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        SftConfig(**wrong)


def test_an_argument_that_trl_does_not_know_is_named(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = kept_samples(tmp_path / "s.jsonl", questions=2)
    flags = ["--policy", str(llama), "--samples-file", str(samples), "--output", str(tmp_path / "o")]
    assert main(["sft", *flags, "--trainer", '{"learning_rat": 1}']) == 2
    assert "learning_rat" in capsys.readouterr().err
    assert main(["sft", *flags, "--trainer", '{"learning_rate": 1}']) == 2
    assert "learning_rate is set by a flag" in capsys.readouterr().err


def test_the_command_writes_an_adapter_and_resumes_to_the_same_weights(llama: Path, tmp_path: Path) -> None:
    samples = kept_samples(tmp_path / "s.jsonl", questions=6)
    flags = ["sft", "--policy", str(llama), "--samples-file", str(samples), "--lora-rank", "2", *SHORT]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert main([*flags, "--output", str(whole), "--save-steps", "2"]) == 0
    kept = tmp_path / "whole.run" / "checkpoint-2"
    shutil.copytree(kept, tmp_path / "resumed.run" / kept.name)
    (later := tmp_path / "resumed.run" / "checkpoint-3").mkdir()  # a checkpoint that was cut: it has no complete.json
    assert main([*flags, "--output", str(resumed), "--save-steps", "2"]) == 0
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (whole, resumed))
    assert all(weight.equal(second[name]) for name, weight in first.items())
    assert later.is_dir()
    assert main([*flags, "--output", str(resumed), "--learning-rate", "0.5"]) == 2
    kept_samples(samples, questions=12)  # other data
    assert main([*flags, "--output", str(resumed), "--save-steps", "2"]) == 2
    record = json.loads((whole / "manifest.json").read_text())
    assert record["command"] == "rtap train sft"
    assert set(record["figures"]["rows"]) == {"corrected", "confirmed", "kept", "too_long"}
    assert record["figures"]["loss"] > 0
    first_line = json.loads((tmp_path / "resumed.run" / "train.jsonl").read_text().splitlines()[0])
    assert first_line["step"] == 3
    base = AutoModelForCausalLM.from_pretrained(llama)
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    tuned = PeftModel.from_pretrained(base, whole).merge_and_unload()
    assert any(not weight.equal(before[name]) for name, weight in tuned.state_dict().items())


def test_a_merged_policy_is_a_checkpoint_that_continues_its_answers(llama: Path, tmp_path: Path) -> None:
    samples, output = kept_samples(tmp_path / "s.jsonl", questions=3), tmp_path / "merged"
    flags = ["--samples-file", str(samples), "--lora-rank", "2", "--merge", *SHORT]
    assert main(["sft", "--policy", str(llama), "--output", str(output), *flags]) == 0
    config = json.loads((output / "config.json").read_text())
    assert config["rtap"] == {"format": "think", "recursion": "continue"}
    assert AutoModelForCausalLM.from_pretrained(output).dtype is torch.bfloat16


def test_a_student_imitates_what_its_teacher_writes_on_questions(tmp_path: Path) -> None:
    """The bundled policy is right on most sums, and its student has the same tokens."""
    output = tmp_path / "student"
    flags = ["--questions", "arithmetic", "--num-questions", "6", "--samples", "2", "--max-cycle-tokens", "96"]
    policies = ["--policy", str(BUNDLED / "student"), "--teacher", str(BUNDLED / "policy")]
    assert main(["sft", "--data", "right", "--output", str(output), *policies, *flags, *SHORT]) == 0
    rows = json.loads((output / "manifest.json").read_text())["figures"]["rows"]
    assert rows["right"] >= 6
    assert not list((tmp_path / "student.run").glob("samples-*"))
    other = ["--policy", str(save_llama(tmp_path / "llama", extra_token=True)), "--teacher", str(BUNDLED / "policy")]
    assert main(["sft", "--data", "right", "--output", str(output), *other, *flags]) == 2
