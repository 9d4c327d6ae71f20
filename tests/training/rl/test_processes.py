"""Two processes on CPUs (gloo) against one: plain data parallelism, and FSDP2's sharded weights.

NCCL and vLLM need GPUs and are not tested here.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rtap_core.errors import ConfigError
from rtap_training.config.rl import GrpoConfig
from rtap_training.rl import command
from rtap_training.rl.checkpoints import last_checkpoint
from tests.training.rl.tiny import BUNDLED, save_generator, save_policy

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
PYTHONPATH = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
UPDATES = 20
# Six rows a process, so that the second of three questions lies on both.
SCRIPTED = {
    "questions_per_step": 3, "group_size": 4, "micro_batch": 3, "num_questions": 16, "max_steps": UPDATES,
    "save_steps": 10, "max_tokens": 160, "length_cache": 16, "max_cycles": 3, "num_iterations": 2,
    "learning_rate": 1e-3, "generator_rate": 1e-3, "generator_iterations": 3,
    "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0,
}  # fmt: skip
SAMPLED = SCRIPTED | {
    "policy": str(BUNDLED / "policy"), "confidence": str(BUNDLED / "confidence"), "questions_per_step": 2,
    "micro_batch": 4, "num_iterations": 1, "save_steps": 1, "max_cycle_tokens": 40, "max_cycles": 2,
    "learning_rate": 1e-4, "generator_rate": 1e-4, "generator_iterations": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One launch. folder: its runs. records: of the scripted run, by process."""

    folder: Path
    records: list[dict[str, Any]]

    @property
    def weights(self) -> dict[str, Tensor]:
        return self.records[0]["weights"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    policy = save_policy(folder / "policy", seed=1)
    return {"policy": str(policy), "confidence": str(save_generator(folder / "confidence", policy, seed=2))}


def launch(folder: Path, models: dict[str, str], processes: int, *flags: str) -> Run:
    settings = SCRIPTED | models | {"output": str(folder / "scripted")}
    jobs = [{"method": "rtap", "settings": settings, "record": str(folder)}]
    if processes > 1:
        for output, max_steps in (("whole", 2), ("resumed", 1), ("resumed", 2)):
            settings = SAMPLED | {"output": str(folder / output), "max_steps": max_steps}
            jobs.append({"method": "rtap", "settings": settings, "record": None})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    script = [str(Path(__file__).with_name("run_processes.py")), str(folder / "jobs.json"), *flags]
    result = subprocess.run(
        [sys.executable, *(torchrun if processes > 1 else []), *script],
        env=os.environ | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}, cwd=ROOT, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    return Run(folder, [torch.load(folder / f"rank{rank}.pt") for rank in range(processes)])


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, models: dict[str, str]) -> Run:
    return launch(tmp_path_factory.mktemp("one"), models, 1)


@pytest.fixture(scope="module", params=["copies", "fsdp2"])
def two(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, models: dict[str, str]) -> Run:
    flags = ["--fsdp2"] if request.param == "fsdp2" else []
    return launch(tmp_path_factory.mktemp(request.param), models, 2, *flags)


def test_rewards_and_advantages_are_those_of_one_process(one: Run, two: Run) -> None:
    alone = one.records[0]["generations"]
    first, second = (record["generations"] for record in two.records)
    assert len(alone) == len(first) == len(second) == UPDATES / 2
    for whole, left, right in zip(alone, first, second, strict=True):
        assert left["questions"] + right["questions"] == whole["questions"]
        torch.testing.assert_close(left["rewards"], whole["rewards"])
        torch.testing.assert_close(right["rewards"], whole["rewards"])
        torch.testing.assert_close(torch.cat([left["advantages"], right["advantages"]]), whole["advantages"])


def test_a_group_on_both_processes_is_normalised_as_one(two: Run) -> None:
    left, right = (record["generations"][0] for record in two.records)
    assert set(left["questions"]) & set(right["questions"])
    together = torch.cat([left["advantages"], right["advantages"]]).reshape(3, 4)
    torch.testing.assert_close(together.sum(dim=1), torch.zeros(3), atol=1e-5, rtol=0)


def test_final_weights_are_those_of_one_process(one: Run, two: Run) -> None:
    """Policy and generator in fp32; only the order of additions differs."""
    assert two.weights.keys() == one.weights.keys()
    torch.testing.assert_close(two.weights, one.weights, atol=5e-5, rtol=0)


def test_policy_and_generator_have_moved(one: Run, models: dict[str, str]) -> None:
    for name, kind in (("policy", "policy"), ("confidence", "generator")):
        before = load_file(Path(models[name]) / "model.safetensors")
        assert max((one.weights[f"{kind}.{key}"] - before[key]).abs().max() for key in before) > 1e-3


def test_both_processes_end_with_the_same_weights(two: Run) -> None:
    left, right = (record["weights"] for record in two.records)
    assert all(left[name].equal(right[name]) for name in left)


def test_saved_checkpoints_are_those_of_one_process(one: Run, two: Run) -> None:
    for name in ("scripted", "scripted-confidence"):
        ours, theirs = (load_file(run.folder / name / "model.safetensors") for run in (two, one))
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-2)  # bf16
        config, other = ((run.folder / name / "config.json").read_text() for run in (two, one))
        assert config == other


def test_only_the_first_process_writes_but_for_its_own_state(two: Run) -> None:
    private = {p.name for p in two.folder.rglob("*") if p.is_file() and p.stat().st_mode & 0o077 == 0}
    own_state = {"rng_state_1.pth", "__1_0.distcp"}
    assert {n for n in private if not n.endswith(".safetensors")} <= own_state | {"rank1.pt"}


def test_a_resumed_run_is_the_uninterrupted_one(two: Run) -> None:
    """Sampled rollouts: each process restores its random state."""
    whole, resumed = (
        [json.loads(line) for line in (two.folder / f"{name}.run" / "train.jsonl").read_text().splitlines()]
        for name in ("whole", "resumed")
    )
    for name in ("loss", "grad_norm", "reward", "entropy", "cycles/mean"):
        values = [row[name] for row in whole if name in row]
        assert [row[name] for row in resumed if name in row] == values
        assert len(values) == 2
    for name in ("", "-confidence"):
        weights, other = (load_file(two.folder / f"{run}{name}" / "model.safetensors") for run in ("whole", "resumed"))
        assert all(weights[key].equal(other[key]) for key in weights)
    assert any(r["cycles/mean"] > 1 for r in whole if "cycles/mean" in r)
    assert last_checkpoint(two.folder / "resumed.run") == two.folder / "resumed.run" / "checkpoint-2"


def test_rows_that_do_not_divide_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = GrpoConfig(output=tmp_path / "out", group_size=4, questions_per_step=4, micro_batch=8)
    for world in ("3", "4"):
        monkeypatch.setenv("WORLD_SIZE", world)
        if world == "3":
            with pytest.raises(ConfigError, match="=16 sequences over 3 processes"):
                command.trl_arguments(config)
        else:
            assert command.rows_of_a_process(config, 4) == 4
