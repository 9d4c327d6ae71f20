"""The RL command on a vision-language policy with pictured questions. A tiny model: mechanics, not learning."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from rtap_core.errors import ConfigError
from rtap_training.config.rl import RatioLevel, RladConfig, RtapConfig
from rtap_training.data.questions import load_questions
from rtap_training.rl import command
from rtap_training.rl.dataset import build_dataset, open_image
from rtap_training.rl.lockstep import Completion, Request
from rtap_training.rl.trainer import RecursiveTrainer
from rtap_training.tasks.base import PicturedQuestion, Question, Split
from tests.training.rl.tiny import BUNDLED, save_policy
from tests.training.rl.tiny_vlm import encoded, picture, save_vlm

UPDATES = 10


def write_questions(folder: Path) -> Path:
    """Forty images with the same question text and different answers, alternating files and base64."""
    rows: list[dict[str, Any]] = []
    for index in range(40):
        image = encoded(index)
        if index % 2:
            image = f"{index}.png"
            picture(index).save(folder / image)
        rows.append({"question": "how bright?", "answer": str(index), "image": image})
    file = folder / "bright.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vlm(tmp_path_factory.mktemp("vlm") / "model")


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("questions"))


@pytest.fixture(scope="module")
def config(vlm: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> RtapConfig:
    return RtapConfig(
        policy=vlm, confidence=None, rewards="format,answer", output=tmp_path_factory.mktemp("run") / "out",
        questions=str(questions), max_steps=UPDATES, save_steps=UPDATES, num_iterations=2, questions_per_step=2,
        group_size=4, micro_batch=4, max_tokens=100, length_cache=16, max_cycle_tokens=40, max_cycles=2,
        learning_rate=1e-3, top_p=1.0, top_k=0, repetition_penalty=1.0,
    )  # fmt: skip


def curve(config: RtapConfig) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (config.run_dir / "train.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def finished(config: RtapConfig) -> RtapConfig:
    """Run with scripted completions, half of them right, derived from the images in the batch."""
    answers = {q.identity: q.answer for q in load_questions(config.questions, Split.TRAIN, seed=1, count=40)}
    assert len(set(answers.values())) == len(answers) > 30

    def generate(self: RecursiveTrainer, requests: Sequence[Request], prompts: list[Any]) -> list[Completion]:
        texts = [
            self.components.dialect.encode(
                f"<think>{r.row}</think><answer>{_shade(prompts[r.row]) + r.row % 2}</answer>"
            )
            for r in requests
        ]
        return [Completion(ids, None) for ids in texts]

    scripted = replace(
        config, max_cycles=1, beta=0.0, boundary_advantage=0.0, learning_rate=5e-5, ratio=RatioLevel.TOKEN
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecursiveTrainer, "_generate_batch", generate)
        command.run(scripted)
    return scripted


def _shade(messages: list[dict[str, Any]]) -> int:
    """Red value of the image."""
    return messages[-1]["content"][0]["image"].getpixel((0, 0))[0]


@pytest.mark.slow
def test_each_row_is_checked_against_the_answer_of_its_own_picture(finished: RtapConfig) -> None:
    assert curve(finished)[0]["rewards/answer/mean"] == 0.5
    assert curve(finished)[0]["rewards/format/mean"] == 1.0


@pytest.mark.slow
def test_the_scripted_reward_lowers_the_loss(finished: RtapConfig) -> None:
    """Advantages sum to zero, so a generation's loss starts at 0; after the first update it is lower."""
    lines = curve(finished)
    assert len(lines) == UPDATES
    assert all(line["grad_norm"] > 0 for line in lines)
    assert all(abs(line["loss"]) < 1e-5 for line in lines[::2])
    assert all(line["loss"] < -1e-3 for line in lines[1::2])


@pytest.mark.slow
def test_the_vision_encoder_stays_and_the_language_model_moves(finished: RtapConfig) -> None:
    before, after = (load_file(path / "model.safetensors") for path in (finished.policy, finished.output))
    assert before.keys() == after.keys()
    moved = {name for name in before if not before[name].bfloat16().equal(after[name])}
    assert not {name for name in moved if "vision_tower" in name}
    assert {name for name in moved if "language_model" in name}
    assert {name for name in moved if "multi_modal_projector" in name}


@pytest.mark.slow
def test_it_is_saved_with_its_processor_and_format(finished: RtapConfig) -> None:
    saved = json.loads((finished.output / "config.json").read_text())
    assert (saved["architectures"], saved["dtype"]) == (["LlavaForConditionalGeneration"], "bfloat16")
    assert saved["rtap"] == {"format": "rtap"}
    processor = AutoProcessor.from_pretrained(finished.output)
    message = {"role": "user", "content": [{"type": "image", "image": picture(3)}, {"type": "text", "text": "what?"}]}
    ids = processor.apply_chat_template(
        [message], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    model = LlavaForConditionalGeneration.from_pretrained(finished.output, dtype=torch.float32)
    assert model(**ids).logits.isfinite().all()


@pytest.mark.slow
def test_sampled_rollouts_recur_with_their_picture(config: RtapConfig, tmp_path: Path) -> None:
    """Later cycles get the pixels of the continuing rows only."""
    sampled = replace(config, output=tmp_path / "out", max_steps=2, save_steps=2, learning_rate=5e-5)
    command.run(sampled)
    assert curve(sampled)[0]["cycles/mean"] > 1
    assert all(abs(line["loss"]) < 1 for line in curve(sampled))


def test_a_language_model_refuses_pictures(config: RtapConfig, tmp_path: Path) -> None:
    policy = save_policy(tmp_path / "policy", seed=1)
    with pytest.raises(ConfigError, match="has no vision encoder"):
        command.run(replace(config, policy=policy, output=tmp_path / "out"))


def test_a_generator_of_other_tokens_and_a_teacher_are_refused(config: RtapConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has 448 token ids, the policy 449"):
        command.run(replace(config, confidence=BUNDLED / "confidence", output=tmp_path / "out"))
    rlad = RladConfig(policy=config.policy, questions=config.questions, teacher="t", output=tmp_path / "out")
    with pytest.raises(ConfigError, match="a teacher reads token ids only"):
        command.run(rlad)


def test_pictures_come_from_files_and_base64() -> None:
    for text in (encoded(7), f"data:image/png;base64,{encoded(7)}"):
        assert open_image(text).getpixel((0, 0)) == (7, 248, 128)
    with pytest.raises(ConfigError, match=r"'nothing\.png' is neither an image file nor a base64"):
        open_image("nothing.png")


def test_some_questions_with_pictures_and_some_without_are_refused() -> None:
    mixed = [PicturedQuestion("a", "b", "t", encoded(1)), Question("c", "d", "t")]
    with pytest.raises(ConfigError, match="1 of 2 questions have an image"):
        build_dataset(mixed, sees_images=True)


def test_same_words_of_other_pictures_are_other_questions(questions: Path) -> None:
    loaded = [load_questions(str(questions), split, seed=1, count=99) for split in Split]
    assert sum(map(len, loaded)) == 40
    assert all(isinstance(q, PicturedQuestion) for part in loaded for q in part)


def test_an_image_that_is_no_text_names_its_line(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text('{"question": "a", "answer": "b", "image": 3}\n')
    with pytest.raises(ConfigError, match=r'q\.jsonl:1: "image" must be'):
        load_questions(str(file), Split.TRAIN, seed=1, count=1)
