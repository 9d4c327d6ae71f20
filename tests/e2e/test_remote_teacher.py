"""The remote teacher on a real `vllm serve`, against the same checkpoint as a local teacher; both in fp32."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rtap_core.errors import ConfigError
from rtap_training.config.rl import RladConfig
from rtap_training.data.questions import load_questions
from rtap_training.models.loading import load_for_training
from rtap_training.models.teacher import RemoteTeacher, Teacher
from rtap_training.rl import command
from rtap_training.tasks.base import Split
from rtap_training.training_errors import TeacherError
from tests.e2e.conftest import MODELS, Running, free_port, running, vllm_command

pytestmark = pytest.mark.slow
# Different kernels on both sides add in different orders.
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    port = free_port()
    flags = ["--dtype", "float32", "--kv-cache-memory-bytes", str(2**29), "--enable-prefix-caching"]
    with running(vllm_command("policy", port, *flags), port, "/health", tmp_path_factory.mktemp("teacher")) as started:
        yield started


def config(teacher: str, output: Path, **changes: object) -> RladConfig:
    settings = {
        "policy": MODELS / "policy", "teacher": teacher, "output": output, "group_size": 4, "questions_per_step": 4,
        "micro_batch": 8, "num_questions": 16, "max_tokens": 96, "length_cache": 16, "max_steps": 1, "save_steps": 1,
    }  # fmt: skip
    return RladConfig(**settings | changes)


def build(teacher: str, output: Path) -> Teacher:
    """The teacher of a run, checks included."""
    settings = config(teacher, output)
    questions = load_questions("countdown", Split.TRAIN, seed=1, count=16)
    trainer = command.build_trainer(settings, load_for_training(settings.policy), questions)
    assert trainer.components.teacher is not None
    return trainer.components.teacher


def rows(vocabulary: int = 448) -> tuple[Tensor, Tensor]:
    """Forty rows of random tokens with padding on both sides; more than the server takes in flight, some alike."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (20, 70), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(20):
        mask[row, : row % 7] = 0
        mask[row, 70 - row :] = 0
    return torch.cat([ids, ids]), torch.cat([mask, mask])


def test_log_probabilities_are_those_of_the_local_teacher(served: Running, tmp_path: Path) -> None:
    ids, mask = rows()
    used = mask[:, -40:].bool()
    remote = build(served.url, tmp_path / "a").logps(ids, mask, 40)
    local = build(str(MODELS / "policy"), tmp_path / "b").logps(ids, mask, 40)
    assert remote.shape == local.shape == (40, 40)
    assert (remote - local)[used].abs().max() < TOLERANCE
    assert not remote[~used].any()
    assert remote[:20].equal(remote[20:]) or (remote[:20] - remote[20:]).abs().max() < TOLERANCE


def test_asking_again_gives_the_same_though_the_prompts_are_cached(served: Running, tmp_path: Path) -> None:
    ids, mask = rows()
    teacher = RemoteTeacher(served.url)
    first, second = (teacher.logps(ids, mask, 40) for _ in range(2))
    assert (first - second).abs().max() < TOLERANCE


def test_an_update_is_that_of_the_local_teacher(served: Running, tmp_path: Path) -> None:
    figures = []
    for name, teacher in (("remote", served.url), ("local", str(MODELS / "policy"))):
        settings = config(teacher, tmp_path / name, temperature=1.0)
        command.run(settings)
        line = (settings.run_dir / "train.jsonl").read_text().splitlines()[0]
        figures.append(json.loads(line))
    for name in ("loss", "grad_norm", "teacher/log_ratio"):
        assert figures[0][name] == pytest.approx(figures[1][name], abs=TOLERANCE)


def test_a_row_longer_than_the_context_is_a_sentence(served: Running) -> None:
    ids = torch.full((1, 1100), 5)
    with pytest.raises(TeacherError, match=r"/v1/completions answered 400: .*"):
        RemoteTeacher(served.url).logps(ids, torch.ones_like(ids), 10)


def test_rollouts_that_cannot_fit_are_refused_before_the_run(served: Running, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="teacher's context of 1024"):
        command.run(config(served.url, tmp_path / "out", max_tokens=1024))


def test_a_dead_address_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"no teacher answers at http://127\.0\.0\.1:\d+/v1/models"):
        command.run(config(f"http://127.0.0.1:{free_port()}", tmp_path / "out"))
