"""A generator for a model of another kind than the bundled ones: how it is asked, sampled, and what its head sits on.

The whole command, on a model with contrast in its answers, is tests/e2e/test_own_model.py.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM, TrainingArguments

from rtap_core.adapters import merge_to_checkpoint, read_backbone
from rtap_core.errors import ConfigError
from rtap_training.__main__ import main
from rtap_training.config.generator import GeneratorConfig
from rtap_training.data.trajectories import kept_trajectories, numbered, prompt_ids
from rtap_training.evaluation.scoring import score_samples
from rtap_training.generator import ClassifierTrainer, Padding, _corruptions, _dataset, _fresh, _weighted
from rtap_training.models.huggingface import load_tokenizer, save_checkpoint
from rtap_training.models.loading import Loaded, load_dialect, load_for_training
from rtap_training.models.online_generator import LabelledCycle
from rtap_training.rl.rollouts import Dialect
from rtap_training.supervised import trainer_arguments
from rtap_training.tasks.base import Split
from rtap_training.tasks.jsonl import question_split
from tests.training.demo import encode_question
from tests.training.rl.tiny import BUNDLED

SMALL = ["--num-questions", "12", "--eval-questions", "4", "--samples", "2", "--max-cycle-tokens", "12"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama") / "model")


def save_llama(folder: Path, *, extra_token: bool = False) -> Path:
    """Random weights in the bundled tokenizer; its format is `think`, as of any checkpoint that says nothing."""
    tokenizer = load_tokenizer(BUNDLED / "policy")
    if extra_token:
        tokenizer.add_tokens(["<other>"])
    torch.manual_seed(1)
    shape: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None,
    }  # fmt: skip
    save_checkpoint(folder, LlamaForCausalLM(LlamaConfig(**shape)), tokenizer, {})
    return folder


@pytest.fixture(scope="module")
def loaded(llama: Path) -> Loaded:
    return load_for_training(llama)


def test_it_is_asked_in_its_own_chat_template(loaded: Loaded) -> None:
    assert loaded.dialect.format.name == "think"
    ids = prompt_ids(loaded.dialect, "make 82 from 3, 7, 25")
    assert ids == encode_question("make 82 from 3, 7, 25")


def test_a_head_of_one_label_on_the_body_and_a_pad_token_to_pool_by(llama: Path, tmp_path: Path) -> None:
    model = _fresh(GeneratorConfig(policy=str(llama), questions="countdown"), pad_id=7)
    body = LlamaForCausalLM.from_pretrained(llama).model.state_dict()
    assert all(value.equal(body[name]) for name, value in model.base_model.state_dict().items())
    model.save_pretrained(tmp_path)
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path).config
    assert (config.num_labels, config.pad_token_id) == (1, 7)


def kept_samples(path: Path, *, questions: int = 40, prompt: str = "{} = ? Box it.") -> Path:
    """Right and wrong sums in the format of `rtap eval`; a wrong one is off by one in its last digit."""
    rows: list[dict[str, Any]] = []
    for n in range(questions):
        a, b = 11 + n, 7 + 3 * n
        for right in (True, False):
            text = f"{a} + {b} = {a + b + (not right)}, so \\boxed{{{a + b + (not right)}}}"
            rows.append({"task": "sums", "question": f"{a} + {b}", "reference": str(a + b), "text": text, "tokens": 20})
            rows[-1]["think"] = ""
            rows[-1]["prompt"] = prompt.format(rows[-1]["question"])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_kept_samples_are_read_as_they_were_asked_and_judged(loaded: Loaded, tmp_path: Path) -> None:
    found = kept_trajectories(loaded.dialect, kept_samples(tmp_path / "samples.jsonl", questions=3))
    assert [question.question for question, _ in found] == [
        "11 + 7 = ? Box it.",
        "12 + 10 = ? Box it.",
        "13 + 13 = ? Box it.",
    ]
    (first, second) = found[0][1]
    assert list(first.prompt_ids) == prompt_ids(loaded.dialect, "11 + 7 = ? Box it.")
    assert loaded.dialect.decode(first.cycles[0].ids).endswith("11 + 7 = 18, so \\boxed{18}")
    assert [first.is_right, second.is_right] == [True, False]
    assert [t.question for t in numbered([rows for _, rows in found])] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    "flags",
    [[], ["--lora-rank", "2", "--merge", "--bf16"], ["--backbone", "BACKBONE"]],
    ids=["all weights", "merged lora in bf16", "another backbone"],
)
def test_a_generator_of_kept_samples_is_one_checkpoint_as_the_server_loads_it(
    flags: list[str], llama: Path, tmp_path: Path
) -> None:
    samples, output = kept_samples(tmp_path / "samples.jsonl", questions=60), tmp_path / "generator"
    own = [str(BUNDLED / "student") if flag == "BACKBONE" else flag for flag in flags]
    more = ["--epochs", "1", "--num-layers", "1", "--learning-rate", "1e-3"]
    assert (
        main(
            ["generator", "--policy", str(llama), "--samples-file", str(samples), "--output", str(output), *own, *more]
        )
        == 0
    )
    model = AutoModelForSequenceClassification.from_pretrained(output)
    assert model.config.num_hidden_layers == 1
    assert model.config.rtap["kind"] == "confidence"
    assert model.config.model_type == ("qwen3" if own[:1] == ["--backbone"] else "llama")
    assert load_tokenizer(output).chat_template
    assert not list(output.glob("adapter*"))


def test_an_adapter_is_merged_into_the_classifier_that_was_judged(llama: Path, tmp_path: Path) -> None:
    samples, output = kept_samples(tmp_path / "samples.jsonl", questions=60), tmp_path / "generator"
    flags = ["--lora-rank", "2", "--epochs", "1", "--num-layers", "1", "--learning-rate", "1e-3"]
    assert (
        main(["generator", "--policy", str(llama), "--samples-file", str(samples), "--output", str(output), *flags])
        == 0
    )
    assert not (output / "model.safetensors").exists()
    config = json.loads((output / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["rtap"]["input"] == "token_ids"
    assert read_backbone(output) == str(llama)
    whole = merge_to_checkpoint(output, str(llama), tmp_path / "cache")
    assert merge_to_checkpoint(output, str(llama), tmp_path / "cache") == whole
    assert json.loads((whole / "config.json").read_text())["rtap"] == config["rtap"]
    scored = tmp_path / "scored.jsonl"
    score_samples([samples], policy=str(llama), generator=output, output=scored)
    rows = [json.loads(line) for line in scored.read_text().splitlines()]
    again = tmp_path / "again.jsonl"
    score_samples([samples], policy=str(llama), generator=whole, output=again)
    found = [json.loads(line)["confidence"] for line in again.read_text().splitlines()]
    assert [row["confidence"] for row in rows] == pytest.approx(found, abs=0.01)
    assert len(set(found)) > 60
    # The same figures as those that training wrote, of the questions that it held out.
    held_out = [(row["confidence"], f"{{{row['reference']}}}" in row["text"]) for row in rows if is_held_out(row)]
    brier = sum((confidence - right) ** 2 for confidence, right in held_out) / len(held_out)
    assert brier == pytest.approx(
        json.loads((output / "manifest.json").read_text())["figures"]["held_out"]["all"]["brier"], abs=2e-3
    )
    assert all(row["confidence_tokens"] > 20 for row in rows)


def is_held_out(row: dict[str, Any]) -> bool:
    return question_split(row["prompt"]) is Split.HELD_OUT


def test_a_folder_that_is_no_generators_adapter_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/model"}')
    with pytest.raises(ConfigError, match="is no generator's adapter: it needs adapter_model"):
        read_backbone(tmp_path)
    for name in ("adapter_model.safetensors", "config.json"):
        (tmp_path / name).touch()
    assert read_backbone(tmp_path) == "someone/model"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "give questions (a JSONL file, rg:NAME, hf:NAME or a bundled task)"),
        (["--questions", "countdown", "--prompt", "Solve it."], "prompt='Solve it.' has no {question}"),
        (["--questions", "countdown", "--samples-file", "s.jsonl"], "give questions"),
        (["--samples-file", "nowhere.jsonl"], "cannot read the samples file nowhere.jsonl"),
        (["--questions", "countdown", "--merge"], "merge needs lora_rank"),
        (["--questions", "countdown", "--lora-rank", "-1"], "lora_rank=-1 must be at least 0"),
        (["--questions", "countdown", "--samples", "1"], "must be at least 2"),
        (["--questions", "countdown", "--epochs", "0"], "epochs=0 must be at least 1"),
        (["--questions", "countdown", "--micro-batch", "5"], "micro_batch=5 must divide batch_size=32"),
        (["--questions", "countdown", "--trainer", '{"seed": 1}'], "seed is set by a flag"),
        (["--questions", "countdown", "--corruptions", "9", *SMALL], "corruptions=9 need bundled tasks"),
        (["--questions", "countdown", "--equation-weight", "-1"], "equation_weight=-1.0 must be at least 0"),
        (["--questions", "countdown", "--validation-share", "1"], "validation_share=1.0 must be between"),
        (["--questions", "nowhere/questions.jsonl"], "cannot read the question file"),
        (["--questions", "countdown", *SMALL], "no contrast to learn from"),  # random weights are never right
        (["--questions", "countdown", "--policy", "nowhere", *SMALL], "cannot load nowhere: "),
    ],
)
def test_what_cannot_work_is_one_sentence(
    flags: list[str], sentence: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "generator"
    assert main(["generator", "--policy", str(llama), "--output", str(output), *flags]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rtap train: ")]
    assert len(told) == 1
    assert sentence in told[0]
    assert not output.exists()


def test_cycles_weigh_the_same_on_both_sides_of_a_question_and_one_on_average(llama: Path) -> None:
    rows = [("mixed", 1, True), ("mixed", 1, True), ("mixed", 2, False), ("mixed", 3, False), ("all right", 4, True)]
    cycles = [LabelledCycle(name, (token,), right) for name, token, right in rows]
    weighted = _weighted(cycles, GeneratorConfig(policy=str(llama), questions="countdown", global_weight=0.5))
    assert [e.weight / weighted[0].weight for e in weighted] == pytest.approx([1.0, 0.5, 0.5, 1.0])
    assert sum(e.weight for e in weighted) == pytest.approx(len(weighted))
    alone = GeneratorConfig(policy=str(llama), questions="countdown", global_weight=0.0)
    assert [e.ids for e in _weighted(cycles, alone)] == [(1,), (2,), (3,)]
    with pytest.raises(ConfigError, match="no question has right and wrong answers; use more samples"):
        _weighted(cycles[-1:], alone)


def test_the_loss_is_the_balanced_cross_entropy_however_rows_are_split(llama: Path, tmp_path: Path) -> None:
    """Two micro batches with accumulation give the gradient of one batch, and padding changes nothing."""
    cycles = [LabelledCycle(str(i % 2), tuple(range(3, 5 + i)), i < 2) for i in range(4)]
    gradients: list[torch.Tensor] = []
    for micro_batch in (4, 2):
        config = GeneratorConfig(
            policy=str(llama), questions="countdown", batch_size=4, micro_batch=micro_batch, epochs=1, seed=3,
            output=tmp_path / f"rows-{micro_batch}", trainer='{"max_grad_norm": 0, "optim": "sgd", "warmup_steps": 0}',
        )  # fmt: skip
        examples = _weighted(cycles, config)
        model = _fresh(config, pad_id=7)
        before = model.score.weight.detach().clone()
        trainer = ClassifierTrainer(
            model=model, args=trainer_arguments(TrainingArguments, config, remove_unused_columns=False),
            train_dataset=_dataset(examples, None), data_collator=Padding(7),
        )  # fmt: skip
        trainer.train()
        gradients.append((before - model.score.weight.detach()) / config.learning_rate)
    assert gradients[0].norm() > 1e-3
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)
    # By hand: the weighted mean of the rows, each read alone.
    model = _fresh(config, pad_id=7)
    losses = [
        e.weight
        * torch.nn.functional.binary_cross_entropy_with_logits(
            model(input_ids=torch.tensor([e.ids])).logits[0, 0], torch.tensor(float(e.is_right))
        )
        for e in examples
    ]
    (sum(losses, torch.zeros(())) / len(losses)).backward()
    torch.testing.assert_close(model.score.weight.grad, gradients[0], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_written_equations_are_read_by_the_same_head_at_their_last_tokens(
    lora_rank: int, llama: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(BUNDLED / "policy")
    texts = ["2*3=6 6+1=8 8-1=7", "2*3=6 6+1=7", "none"]
    rows = [tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    config = GeneratorConfig(
        policy=str(llama), questions="countdown", output=tmp_path / "generator", lora_rank=lora_rank, global_weight=1.0
    )
    examples = _weighted([LabelledCycle(str(i), ids, i == 1) for i, ids in enumerate(rows)], config)
    model = _fresh(config, pad_id=7).eval()
    trainer = ClassifierTrainer(
        model=model, args=trainer_arguments(TrainingArguments, config, remove_unused_columns=False),
        train_dataset=_dataset(examples, tokenizer), data_collator=Padding(7), equation_weight=0.5,
    )  # fmt: skip
    loss = trainer.compute_loss(model, next(iter(trainer.get_eval_dataloader(trainer.train_dataset))))

    def read(ids: tuple[int, ...], label: int) -> torch.Tensor:
        """Loss of a row that ends here."""
        logit = model(input_ids=torch.tensor([ids])).logits[0, 0]
        return torch.nn.functional.binary_cross_entropy_with_logits(logit, torch.tensor(float(label)))

    ends = [[(5, 1), (11, 0), (len(rows[0]), 0)], [(5, 1), (11, 1)]]  # tokens are signs here
    assert [len(tokenizer.tokenize(text)) for text in texts[:2]] == [17, 11]
    expected = sum(read(ids, int(i == 1)) for i, ids in enumerate(rows)) / 3
    for ids, labels in zip(rows, ends, strict=False):
        expected += 0.5 * sum(read(ids[:end], label) for end, label in labels) / len(labels) / 3
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "score" in name and p.requires_grad)


def test_corrupted_workings_have_both_labels_and_are_of_training_questions() -> None:
    *_, dialect = load_dialect(BUNDLED / "policy")
    config = GeneratorConfig(policy=str(BUNDLED / "policy"), questions="arithmetic", corruptions=5)
    found = _corruptions(config, dialect)
    assert found == _corruptions(config, dialect)
    by_question: dict[str, set[bool]] = {}
    for cycle in found:
        by_question.setdefault(cycle.question, set()).add(cycle.is_right)
    assert [*by_question.values()] == [{True, False}] * 5
    assert all("<think>" in dialect.decode(cycle.ids) for cycle in found)


def _prompt(cycle: LabelledCycle, dialect: Dialect) -> str:
    return dialect.decode(cycle.ids).partition("<think>")[0]


def test_a_right_working_of_no_question_is_wrong() -> None:
    _, _, dialect = load_dialect(BUNDLED / "policy")
    config = GeneratorConfig(policy=str(BUNDLED / "policy"), questions="arithmetic", corruptions=100)
    found = _corruptions(config, dialect)
    prompts = {one.question: _prompt(one, dialect) for one in found if one.is_right}
    unrelated = [one for one in found if _prompt(one, dialect) != prompts[one.question]]
    assert len(unrelated) > 5
    assert not any(one.is_right or set("0123456789") & set(_prompt(one, dialect)) for one in unrelated)


def test_a_killed_run_resumes_to_the_same_generator(llama: Path, tmp_path: Path) -> None:
    samples = kept_samples(tmp_path / "samples.jsonl", questions=60)
    flags = ["generator", "--policy", str(llama), "--samples-file", str(samples), "--epochs", "1", "--save-steps", "2",
             "--batch-size", "32", "--learning-rate", "1e-3"]  # fmt: skip
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert main([*flags, "--output", str(whole)]) == 0
    kept = tmp_path / "whole.run" / "checkpoint-2"
    shutil.copytree(kept, tmp_path / "resumed.run" / kept.name)
    assert main([*flags, "--output", str(resumed)]) == 0
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert all(weight.equal(second[name]) for name, weight in first.items())
    assert json.loads((tmp_path / "resumed.run" / "train.jsonl").read_text().splitlines()[0])["step"] == 3
    assert main([*flags, "--output", str(resumed), "--learning-rate", "0.5"]) == 2


def test_without_a_chat_template_nothing_says_how_it_is_asked(llama: Path, tmp_path: Path) -> None:
    for file in llama.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="no chat template"):
        load_for_training(tmp_path)
