"""One process of a training run; test_processes.py starts it alone or under torchrun.

Usage: run_processes.py JOBS.json [--fsdp2]. A job is {"method", "settings", "record"}: where "record" names a folder,
completions are a function of question, row and depth, so that the run cannot depend on how many processes sample, and
what each process saw is written there.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, DistributedType, PartialState
from transformers import PreTrainedModel

from rtap_training.config.rl import CONFIGS, RlConfig
from rtap_training.config.settings import build_config
from rtap_training.data.questions import load_questions
from rtap_training.rl import command
from rtap_training.rl.lockstep import Completion, Request
from rtap_training.rl.trainer import RecursiveTrainer
from rtap_training.tasks.base import Split

RANK = int(os.environ.get("RANK", "0"))


def scripted(config: RlConfig) -> Any:
    """A stand-in for ``_generate_batch``: four in ten cycles are right, and few thoughts are alike."""
    questions = load_questions(config.questions, Split.TRAIN, seed=config.seed, count=config.num_questions)
    answers = {q.question: q.answer for q in questions}

    def generate(self: RecursiveTrainer, requests: Sequence[Request], prompts: list[Any]) -> list[Completion]:
        results: list[Completion] = []
        for request in requests:
            question = prompts[request.row][-1]["content"]
            row = self.accelerator.process_index * len(prompts) + request.row
            rng = Random(f"{question} {row} {len(request.prompt_ids)} {self.state.global_step}")
            answer = answers[question] if rng.random() < 0.4 else str(rng.randrange(90))
            text = f"<think>{rng.randrange(10**6)}</think><answer>{answer}</answer>"
            is_open = self.components.dialect.decode(request.prompt_ids).endswith("<think>")
            ids = self.components.dialect.encode(text.removeprefix("<think>") if is_open else text)
            results.append(Completion(ids[: request.max_tokens], None))
        return results

    return generate


def run_recorded(config: RlConfig, folder: Path) -> None:
    generations: list[dict[str, Any]] = []
    trainers: list[RecursiveTrainer] = []
    originals = RecursiveTrainer._generate_and_score_completions, RecursiveTrainer._generate_batch

    def recording(self: RecursiveTrainer, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = originals[0](self, inputs)
        questions = [x["prompt"][-1]["content"] for x in inputs]
        # Boundaries have an advantage of their own; a row's first token is the policy's.
        generations.append(
            {"questions": questions, "rewards": self._rewards, "advantages": output["advantages"][:, 0].clone()}
        )
        trainers[:] = [self]
        return output

    RecursiveTrainer._generate_and_score_completions, RecursiveTrainer._generate_batch = recording, scripted(config)
    command.run(config)
    RecursiveTrainer._generate_and_score_completions, RecursiveTrainer._generate_batch = originals
    weights: dict[str, torch.Tensor] = {}
    generator = trainers[0].components.generator
    for name, model in (("policy", trainers[0].model), ("generator", generator.model if generator else None)):
        for key, value in model.state_dict().items() if model is not None else ():
            weights[f"{name}.{key}"] = value.full_tensor() if hasattr(value, "full_tensor") else value
    torch.save({"generations": generations, "weights": weights}, folder / f"rank{RANK}.pt")


def shard_on_cpu() -> None:
    """accelerate offers FSDP to accelerators only, though torch shards on CPUs too.

    Loading weights in one process alone is its default, and would leave generator and reference empty in the other.
    """
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    }  # fmt: skip
    initialise = AcceleratorState.__init__

    def sharded(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        initialise(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = sharded


def main(jobs: str, *flags: str) -> None:
    if "--fsdp2" in flags:
        shard_on_cpu()
    if RANK > 0:
        os.umask(0o077)  # so the test sees which files another process than the first has written

        def save(*_: Any, **__: Any) -> None:
            raise AssertionError("only the first process saves models")  # safetensors does not heed the umask

        PreTrainedModel.save_pretrained = save
    Accelerator.end_training = Accelerator.wait_for_everyone  # several runs share the processes
    for job in json.loads(Path(jobs).read_text()):
        config = build_config(CONFIGS[job["method"]], None, job["settings"])
        if job["record"]:
            run_recorded(config, Path(job["record"]))
        else:
            command.run(config)


if __name__ == "__main__":
    main(*sys.argv[1:])
