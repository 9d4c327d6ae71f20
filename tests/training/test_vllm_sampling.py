"""The vLLM sampler on the bundled policy: whole cycles, seeds that reproduce, as many right as transformers gives.

It runs in a separate process, away from pytest's warnings-as-errors.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rtap_core.format import RTAP, parse_cycle
from rtap_training.models.huggingface import load_tokenizer, token_id
from tests.training.demo import decode_ids

pytestmark = pytest.mark.slow

POLICY = Path(__file__).parents[2] / "deploy" / "models" / "policy"
SCRIPT = """
import json, sys
from pathlib import Path
import torch
from rtap_training.config.settings import SamplerKind
from rtap_training.data.questions import held_out_questions
from rtap_training.models.loading import load_dialect
from rtap_training.config.supervised import SupervisedConfig
from rtap_training.tasks import TASKS
from rtap_training.data.trajectories import sample_parts

torch.set_num_threads(1)
policy, output, wanted = sys.argv[1], sys.argv[2], []
questions = [q for name in ("countdown", "arithmetic") for q in held_out_questions(TASKS[name], 2)]
*_, dialect = load_dialect(policy)
for kind in (SamplerKind.VLLM, SamplerKind.TRANSFORMERS):
    for run, seed in enumerate((1, 1, 2)):
        config = SupervisedConfig(
            policy=policy, output=Path(output) / f"{kind}-{run}", sampler=kind, samples=16, seed=seed,
            max_cycle_tokens=160,
        )
        (turns,) = sample_parts(policy, dialect, {"all": questions}, config, max_cycles=2)
        cycles = [[[c.ids, c.answer, c.is_right, c.logprobs.shown()] for c in t.cycles] for t in turns]
        wanted.append([[t.question, c] for t, c in zip(turns, cycles)])
assert not torch.distributed.is_initialized()
print("SAMPLES", json.dumps(wanted))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Trajectories [question, [[ids, answer, right, log-probabilities], ...]]: seeds 1, 1, 2 of vLLM, then the same of
    transformers."""
    folder = tmp_path_factory.mktemp("vllm")
    script = folder / "sample.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parents[2]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, str(script), str(POLICY), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, cwd=root)
    assert done.returncode == 0, done.stderr[-2000:]
    line = next(x for x in done.stdout.splitlines() if x.startswith("SAMPLES"))
    return json.loads(line.removeprefix("SAMPLES"))


def test_seeds_reproduce(runs: list[Any]) -> None:
    for first, again, other in (runs[:3], runs[3:]):
        assert first == again
        assert first != other


def test_samples_of_a_question_differ(runs: list[Any]) -> None:
    """The 16 samples of a Countdown question are not copies. (Arithmetic samples may be.)"""
    for question in (0, 1):
        assert len({str(cycles[0][0]) for q, cycles in runs[0] if q == question}) > 1


def test_every_cycle_parses_and_later_ones_are_forced_open(runs: list[Any]) -> None:
    tokenizer = load_tokenizer(POLICY)
    cycle_open, close = (token_id(tokenizer, tag) for tag in (RTAP.cycle_open, RTAP.answer_close or ""))
    assert [q for q, _ in runs[0]] == [q for q in range(4) for _ in range(16)]
    depths = set()
    for _, cycles in runs[0]:
        depths.add(len(cycles))
        for ids, answer, *_ in cycles:
            assert ids[0] == cycle_open
            assert ids[1:].count(cycle_open) == 0
            assert parse_cycle(decode_ids(tokenizer, ids), RTAP)[1] == answer
            assert (ids[-1] == close) == (answer is not None)
            assert len(ids) <= 161
        assert not any(is_right for _, _, is_right, _ in cycles[:-1])  # cut at the first right one
    assert depths == {1, 2}
    whole = [answer is not None for _, cycles in runs[0] for _, answer, *_ in cycles]
    assert sum(whole) / len(whole) > 0.95


def test_about_as_many_are_right_as_of_transformers(runs: list[Any]) -> None:
    """128 first cycles each, in bf16 and in fp32: a difference of 0.2 is more than three standard deviations."""
    shares = [
        sum(cycles[0][2] for run in (part[0], part[2]) for _, cycles in run) / 128 for part in (runs[:3], runs[3:])
    ]
    assert shares[0] == pytest.approx(shares[1], abs=0.2)
    assert shares[0] > 0.2


def test_both_read_the_same_log_probabilities(runs: list[Any]) -> None:
    """Means over 64 first cycles, in bf16 and in fp32."""
    means = [sum(cycles[0][3]["mean"] for _, cycles in part) / 64 for part in (runs[0], runs[3])]
    assert means[0] == pytest.approx(means[1], abs=0.05)
    assert means[0] < -0.01
