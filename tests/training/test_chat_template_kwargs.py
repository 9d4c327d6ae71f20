"""``--chat-template-kwargs``: every command renders its prompts with them, in a template as of Qwen3."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from rtap_core.errors import ConfigError
from rtap_training.config.generator import GeneratorConfig
from rtap_training.config.rl import CONFIGS, GrpoConfig, RladConfig
from rtap_training.config.settings import SamplerKind, build_config
from rtap_training.config.sft import SftConfig
from rtap_training.data.questions import load_questions
from rtap_training.data.trajectories import kept_trajectories, prompt_ids, sample_parts
from rtap_training.models.huggingface import load_tokenizer
from rtap_training.models.loading import load_dialect, load_for_training
from rtap_training.models.teacher import RemoteTeacher
from rtap_training.rl import command
from rtap_training.sft import build_rows
from rtap_training.tasks.base import Question, Split
from rtap_training.training_errors import TeacherError
from tests.training.rl.tiny import save_policy
from tests.training.test_generator import kept_samples

OFF = '{"enable_thinking": false}'
CLOSED = "<think>\n\n</think>\n\n"
SWITCH = "{%- if add_generation_prompt and enable_thinking is defined and not enable_thinking %}{{- '" + (
    CLOSED.replace("\n", "\\n") + "' }}{%- endif %}"
)
KINDS = {"sft": SftConfig, "generator": GeneratorConfig} | CONFIGS
SOURCES = {
    "rlad": {"teacher": "t"}, "kdrl": {"teacher": "t"}, "sft": {"questions": "countdown"},
    "generator": {"questions": "countdown"},
}  # fmt: skip


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_policy(tmp_path_factory.mktemp("policy") / "model", seed=1)
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + SWITCH)
    return folder


def end_of_prompt(ids: Any, policy: Path) -> str:
    return str(load_tokenizer(policy).decode(list(ids))).rpartition("assistant\n")[2]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{enable_thinking: false}", r"chat_template_kwargs='\{enable_thinking: false\}' is not JSON"),
        ("[false]", r"chat_template_kwargs='\[false\]' must be a JSON object"),
        ('{"tools": []}', r"chat_template_kwargs='\{\"tools\": \[\]\}': tools is set by training"),
    ],
)
def test_every_command_refuses_what_is_no_object_of_variables(name: str, given: str, message: str) -> None:
    known = SOURCES.get(name, {})
    assert build_config(KINDS[name], None, known | {"chat_template_kwargs": OFF}).template_kwargs == json.loads(OFF)
    with pytest.raises(ConfigError, match=message):
        build_config(KINDS[name], None, known | {"chat_template_kwargs": given})


def test_a_variable_that_the_template_does_not_read_is_refused(policy: Path) -> None:
    with pytest.raises(ConfigError, match=r"the chat template of .*model does not read enable_thoughts"):
        load_dialect(policy, {"enable_thoughts": False, "enable_thinking": False})


def test_rows_of_sft_and_kept_samples_begin_with_the_rendered_prompt(policy: Path, tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    chat = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
    file.write_text(json.dumps({"messages": chat}) + "\n")
    samples = kept_samples(tmp_path / "samples.jsonl", questions=1)
    for given, end in (("{}", ""), (OFF, CLOSED)):
        config = SftConfig(policy=str(policy), data=str(file), chat_template_kwargs=given)
        _, tokenizer, dialect = load_dialect(policy, config.template_kwargs)
        (row,), _ = build_rows(config, tokenizer, dialect)
        assert end_of_prompt(row.ids[: row.num_context], policy) == end
        ((_, (kept, *_)),) = kept_trajectories(dialect, samples)
        assert end_of_prompt(kept.prompt_ids, policy) == end


def test_samples_are_of_the_rendered_prompt_and_of_no_other(policy: Path, tmp_path: Path) -> None:
    questions = [Question("1+1", "2", "sums")]

    def sample(given: str) -> list[int]:
        config = GeneratorConfig(
            policy=str(policy), questions="countdown", samples=2, max_cycle_tokens=4, output=tmp_path / "out",
            chat_template_kwargs=given, sampler=SamplerKind.TRANSFORMERS,
        )  # fmt: skip
        *_, dialect = load_dialect(policy, config.template_kwargs)
        ((turn, _),) = sample_parts(str(policy), dialect, {"all": questions}, config, max_cycles=1)
        return list(turn.prompt_ids)

    assert end_of_prompt(sample(OFF), policy) == CLOSED
    sample(OFF)
    with pytest.raises(ConfigError, match=r"another policy or setting \(.*chat_template_kwargs: \{'enable_thinking'"):
        sample("{}")


def test_rollouts_of_reinforcement_learning_begin_with_it(policy: Path, tmp_path: Path) -> None:
    config = GrpoConfig(policy=str(policy), output=tmp_path / "out", chat_template_kwargs=OFF)
    questions = load_questions("countdown", Split.TRAIN, seed=1, count=4)
    loaded = load_for_training(policy, config.template_kwargs)
    trainer = command.build_trainer(config, loaded, questions)
    (ids,), _, _ = trainer._tokenize_prompts([[{"role": "user", "content": "1+1"}]])
    assert end_of_prompt(ids, policy) == CLOSED
    assert list(ids) == prompt_ids(loaded.dialect, "1+1")


def test_a_teacher_must_render_them_alike(policy: Path, tmp_path: Path) -> None:
    teacher = save_policy(tmp_path / "teacher", seed=2)  # does not read the variable
    questions = load_questions("countdown", Split.TRAIN, seed=1, count=4)

    def build(given: str) -> None:
        config = RladConfig(
            policy=str(policy), teacher=str(teacher), output=tmp_path / "out", chat_template_kwargs=given
        )
        command.build_trainer(config, load_for_training(policy, config.template_kwargs), questions)

    build("{}")
    with pytest.raises(TeacherError, match="renders prompts differently"):
        build(OFF)


def test_a_remote_teacher_is_asked_to_render_with_them(policy: Path) -> None:
    student, asked = load_tokenizer(policy), []

    def handle(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content or "{}")
        match request.url.path:
            case "/v1/models":
                return httpx.Response(200, json={"data": [{"id": "big"}]})
            case "/detokenize":
                return httpx.Response(200, json={"prompt": student.decode(body["tokens"])})
            case _:
                asked.append(body["chat_template_kwargs"])
                text = student.apply_chat_template(
                    body["messages"], tokenize=False, add_generation_prompt=True, **body["chat_template_kwargs"]
                )
                return httpx.Response(200, json={"tokens": student.encode(text, add_special_tokens=False)})

    teacher = RemoteTeacher("http://teacher", lambda: httpx.Client(transport=httpx.MockTransport(handle)))
    teacher.check_same_tokens(student, json.loads(OFF))
    assert asked == [{"enable_thinking": False}]
