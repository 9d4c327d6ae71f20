"""A vision-language policy from `rtap train rtap` to `rtap serve`: the saved checkpoint answers about an image.

vLLM's own LLaVA needs torchvision, which the CPU installation leaves out (scripts/setup_env.py); its transformers
backend runs the same model without it.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from rtap_core.format import RTAP
from rtap_server.engine.confidence.yesno import yes_no_ids
from rtap_training.config.rl import RtapConfig
from rtap_training.rl import command
from tests.e2e.conftest import VLLM_FLAGS, Running, free_port, rtap_command, running
from tests.training.rl.tiny_vlm import encoded, picture, save_vlm

pytestmark = pytest.mark.slow
JUDGE = "Answer"  # of all words, one after which this model is not entirely sure of yes or no
QUESTION = "make 82 from 3, 7, 25"
UNSURE = "How do I get 207 from 9, 22, 1?"  # hard enough that what else it sees moves what it writes


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    rows = [{"question": QUESTION, "answer": "25*3+7", "image": encoded(shade)} for shade in range(0, 200, 20)]
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = RtapConfig(
        policy=save_vlm(folder / "model"), confidence=None, rewards="format,answer", output=folder / "out",
        questions=str(folder / "q.jsonl"), max_steps=2, save_steps=2, num_iterations=2, questions_per_step=2,
        group_size=4, micro_batch=4, max_tokens=160, length_cache=16, max_cycle_tokens=80, max_cycles=2,
        learning_rate=1e-5, top_p=1.0, top_k=0, repetition_penalty=1.0,
    )  # fmt: skip
    command.run(config)
    return config.output


@pytest.fixture(scope="module")
def serving(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    port = free_port()
    flags = ["--model-impl", "transformers", "--dtype", "float32", "--kv-cache-memory-bytes", str(2**29)]
    own = ["--confidence", "yesno", "--yesno-question", JUDGE, "--served-model-name", "rtap"]
    with running(
        rtap_command(port, str(trained), *flags, *own, *VLLM_FLAGS), port, "/ready", tmp_path_factory.mktemp("serve")
    ) as started:
        yield started


def ask(serving: Running, shade: int, question: str = QUESTION, **rtap: Any) -> dict[str, Any]:
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded(shade)}"}}
    message = {"role": "user", "content": [image, {"type": "text", "text": question}]}
    body = {"model": "rtap", "messages": [message], "temperature": 0, "max_tokens": 160, "logprobs": True}
    reply = httpx.post(f"{serving.url}/v1/chat/completions", json=body | {"rtap": rtap}, timeout=120)
    assert reply.status_code == 200, reply.text
    return reply.json()


def inputs_of(processor: Any, shade: int, question: str = QUESTION) -> Any:
    """The prompt of ``ask`` as transformers reads it."""
    parts = [{"type": "image", "image": picture(shade)}, {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip


def test_answers_about_images_are_those_of_transformers(trained: Path, serving: Running) -> None:
    """Text, prompt length and log-probabilities of the first cycle, which show that the image was seen."""
    processor = AutoProcessor.from_pretrained(trained)
    model = LlavaForConditionalGeneration.from_pretrained(trained, dtype=torch.float32)
    scores: list[float] = []
    for shade in (9, 250):
        reply = ask(serving, shade, UNSURE, policy="single")
        message, tokens = reply["choices"][0]["message"], reply["choices"][0]["logprobs"]["content"]
        text = RTAP.render_cycle(message["reasoning"], message["content"])
        inputs = inputs_of(processor, shade, UNSURE)
        length = inputs["input_ids"].shape[1]
        result = model.generate(
            **inputs, max_new_tokens=reply["usage"]["completion_tokens"], do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        ids = result.sequences[0, length:]
        assert (processor.decode(ids), length) == (text, reply["usage"]["prompt_tokens"])
        logps = torch.cat(result.logits).log_softmax(-1).gather(-1, ids[:, None])
        scores.append(logps.sum().item())
        of_content = logps[-1 - len(tokens) : -1].sum().item()  # before the end tag
        assert sum(token["logprob"] for token in tokens) == pytest.approx(of_content, abs=5e-3)
    assert abs(scores[0] - scores[1]) > 0.05


def test_an_answer_is_scored_with_the_image(trained: Path, serving: Running) -> None:
    """What transformers thinks of yes and no after the same image, question, cycle and judge's question."""
    processor = AutoProcessor.from_pretrained(trained)
    model = LlavaForConditionalGeneration.from_pretrained(trained, dtype=torch.float32)
    question, yes, no = yes_no_ids(lambda text: processor.tokenizer.encode(text, add_special_tokens=False), JUDGE)
    confidences: list[float] = []
    for shade in (9, 250):
        reply = ask(serving, shade, threshold=0.0, max_cycles=1)
        message, cycle = reply["choices"][0]["message"], reply["rtap"]["cycles"][0]
        written = processor.tokenizer.encode(
            RTAP.render_cycle(message["reasoning"], message["content"]), add_special_tokens=False
        )
        inputs = inputs_of(processor, shade)
        ids = torch.cat([inputs["input_ids"], torch.tensor([[*written, *question]])], dim=1)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=inputs["pixel_values"]).logits[
            0, -1
        ]
        expected = (logits[yes] - logits[no]).sigmoid().item()
        assert cycle["confidence"] == pytest.approx(expected, abs=2e-4)
        confidences.append(expected)
    assert abs(confidences[0] - confidences[1]) > 1e-3


def test_further_cycles_keep_the_image(serving: Running) -> None:
    reply = ask(serving, 9, threshold=1.0, max_cycles=3)
    assert len(reply["rtap"]["cycles"]) > 1
    assert all(cycle["answer"] for cycle in reply["rtap"]["cycles"])
