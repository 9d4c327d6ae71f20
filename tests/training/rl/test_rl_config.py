"""RL configs: the papers' defaults and the refusals."""

import math
from pathlib import Path

import pytest

from rtap_core.errors import ConfigError
from rtap_training.config.rl import (
    CONFIGS,
    ClampGradient,
    GrpoConfig,
    KdrlConfig,
    Method,
    RatioLevel,
    RladConfig,
    RtapConfig,
)
from rtap_training.config.settings import build_config


def test_rtap_has_the_papers_settings() -> None:
    c = RtapConfig()
    assert (c.max_cycles, c.group_size, c.num_iterations, c.beta, c.threshold) == (4, 12, 12, 0.04, 0.55)
    assert (c.clip_low, c.clip_high, c.learning_rate) == (0.2, 0.2, 1e-6)
    assert (c.temperature, c.top_p, c.top_k, c.repetition_penalty) == (1.0, 0.95, 50, 1.05)
    assert c.reward_names == ("increase", "final", "format", "answer", "length")
    assert c.ratio is RatioLevel.SEQUENCE


def test_rlad_has_the_papers_settings() -> None:
    c = RladConfig(teacher="t")
    assert (c.alpha, c.clip_low, c.clip_high, c.teacher_clamp, c.group_size) == (0.5, 0.2, 0.28, 1.0, 8)
    assert c.generation_rows == 256
    assert c.ratio is RatioLevel.TOKEN


def test_eq_5_without_the_clamp_of_appendix_b_is_within_reach() -> None:
    assert build_config(RladConfig, None, {"teacher": "t", "teacher_clamp": "inf"}).teacher_clamp == math.inf


def test_every_command_knows_its_method() -> None:
    assert {name: kind.method for name, kind in CONFIGS.items()} == {m.value: m for m in Method}


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (RladConfig, {}, "rlad needs --teacher"),
        (KdrlConfig, {}, "kdrl needs --teacher"),
        (GrpoConfig, {"rewards": "answer,final"}, "need --confidence"),
        (GrpoConfig, {"rewards": "answr"}, "must list some of"),
        (GrpoConfig, {"rewards": ""}, "must list some of"),
        (GrpoConfig, {"group_size": 1}, "at least 2"),
        (GrpoConfig, {"merge": True}, "merge=True needs a lora_rank"),
        (GrpoConfig, {"lora_rank": -1}, "lora_rank=-1 must be"),
        (GrpoConfig, {"teacher": "t"}, "grpo does not use a teacher"),
        (RtapConfig, {"teacher": "t"}, "rtap does not use a teacher"),
        (RladConfig, {"teacher": "t", "ratio": "sequence"}, "ratio=sequence does not work with rlad"),
        (RladConfig, {"teacher": "t", "teacher_clamp": 0}, r"teacher_clamp=0.0 must be positive"),
        (RladConfig, {"teacher": "t", "teacher_clamp": -1.0}, r"teacher_clamp=-1.0 must be positive"),
        (RladConfig, {"teacher": "t", "teacher_clamp": math.nan}, "teacher_clamp=nan must be positive"),
        (KdrlConfig, {"teacher": "t", "kdrl_decay": -1e-5}, "kdrl_decay=-1e-05 must be a number of at least 0"),
        (KdrlConfig, {"teacher": "t", "kdrl_end": 0.1}, r"kdrl_end=0.1 must not be above kdrl_start=0.005"),
        (GrpoConfig, {"clip_high": -0.1}, "clip_high=-0.1 must be a number of at least 0"),
        (GrpoConfig, {"clip_high": math.inf}, "clip_high=inf must be"),
        (GrpoConfig, {"beta": -1.0}, "beta=-1.0 must be"),
        (RtapConfig, {"generator_rate": 0.0}, "generator_rate=0.0 must be positive"),
        (RtapConfig, {"generator_iterations": -1}, "generator_iterations=-1 must be"),
        (RtapConfig, {"generator_global_weight": 2.0}, "generator_global_weight=2.0 must be in"),
        (RtapConfig, {"boundary_advantage": -1.0}, "boundary_advantage=-1.0 must be"),
        (GrpoConfig, {"alpha": 1.5}, "alpha=1.5 must be in"),
        (GrpoConfig, {"max_steps": 0}, "max_steps=0 must be positive"),
        (GrpoConfig, {"num_iterations": 4, "save_steps": 10}, "between the updates of one generation"),
        (GrpoConfig, {"micro_batch": 60}, "must divide"),
        (GrpoConfig, {"length_cache": 4096}, "length_cache=4096"),
        (RtapConfig, {"vllm": "colocate"}, "needs top_p=1, top_k=0 and repetition_penalty=1"),
        (GrpoConfig, {"learnign_rate": 1e-5}, "unknown settings"),
        (GrpoConfig, {"seed": "one"}, "must be of type int"),
        (GrpoConfig, {"method": "rlad"}, "unknown settings"),
    ],
)
def test_impossible_settings_are_refused(kind, values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(kind, None, values)


def test_yaml_numbers_switches_and_nothing(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("learning_rate: 1e-5\nclamp_gradient: straight_through\nteacher: t\nbf16: true\nconfidence: null\n")
    c = build_config(RladConfig, file, {})
    assert (c.learning_rate, c.clamp_gradient, c.bf16, c.confidence) == (
        1e-5, ClampGradient.STRAIGHT_THROUGH, True, None,
    )  # fmt: skip


def test_the_run_has_its_folder_beside_the_output() -> None:
    assert GrpoConfig(output=Path("a/b")).run_dir == Path("a/b.run")
