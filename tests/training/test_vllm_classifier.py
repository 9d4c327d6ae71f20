"""vLLM's pooling runner serves the bundled generator with the scores transformers gives.

It runs in a separate process, away from pytest's warnings-as-errors.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rtap_core.format import RTAP
from rtap_training.models.huggingface import load_tokenizer
from rtap_training.models.online_generator import load_online_generator, score_rows
from tests.training.demo import MODELS, encode_question, encode_text

pytestmark = pytest.mark.slow

GENERATOR = MODELS / "confidence"
SCRIPT = """
import json, sys
from vllm import LLM

def main():
    options = dict(dtype="bfloat16", enforce_eager=True, max_model_len=512)
    llm = LLM(sys.argv[1], runner="pooling", convert="classify", **options)
    prompts = [{"prompt_token_ids": ids} for ids in json.loads(sys.stdin.read())]
    print("SCORES", json.dumps([out.outputs.probs for out in llm.classify(prompts, use_tqdm=False)]))

if __name__ == "__main__":
    main()
"""
CYCLES = [
    ("make 82 from 3, 7, 25", "25*3=75 75+7=82", "25*3+7"),
    ("make 82 from 3, 7, 25", "25*3=75 75-7=68", "25*3-7"),
    ("make 82 from 3, 7, 25", "Oops, 68 is not 82. 25*3=75 75+7=82", "25*3+7"),
    ("What is 12 * 9?", "10*9=90 2*9=18 90+18=108", "108"),
    ("What is 12 * 9?", "10*9=90 2*9=18 90+18=118", "118"),
]


def test_scores_equal_transformers(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(GENERATOR)
    rows = [
        [*encode_question(question), *encode_text(tokenizer, RTAP.render_cycle(think, answer))]
        for question, think, answer in CYCLES
    ]
    expected = score_rows(load_online_generator(GENERATOR), [tuple(row) for row in rows])
    script = tmp_path / "classify.py"
    script.write_text(SCRIPT)
    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in the script's process: nothing else to start
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, str(script), str(GENERATOR)],
        input=json.dumps(rows), capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    line = next(x for x in done.stdout.splitlines() if x.startswith("SCORES"))
    scores = [row[0] for row in json.loads(line.removeprefix("SCORES"))]
    # bf16 in vLLM against fp32 here: a logit of 8 rounds to 1/32.
    assert scores == pytest.approx(expected, abs=0.03)
