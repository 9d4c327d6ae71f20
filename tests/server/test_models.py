"""`rtap models`: bundled checkpoints and those of a Hub cache."""

import json
from pathlib import Path

import pytest

from rtap_server.models import cached_models, main, size


def _cache(folder: Path, name: str, config: dict[str, object], template: str = "") -> None:
    snapshot = folder / "hub" / f"models--{name.replace('/', '--')}" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(config))
    (snapshot / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    (snapshot / "model.safetensors").write_bytes(b"x" * 1500)


def test_models_of_the_cache_and_the_bundled_ones_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _cache(tmp_path, "org/thinker", {"architectures": ["LlamaForCausalLM"]}, "<think>")
    _cache(tmp_path, "org/judge", {"architectures": ["LlamaForSequenceClassification"]})
    (tmp_path / "hub" / "models--org--partial" / "snapshots" / "abc").mkdir(parents=True)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert main([]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["MODEL", "SOURCE", "SIZE", "FORMAT"]
    assert rows[-2:] == [
        ["org/judge", "Hub", "cache", "2", "kB", "generator"],
        ["org/thinker", "Hub", "cache", "2", "kB", "think"],
    ]
    assert any(row[0].endswith("/policy") and row[-1] == "rtap" for row in rows)
    assert main(["--json"]) == 0
    assert {"name": "org/thinker", "source": "Hub cache", "bytes": 1500, "format": "think"} in json.loads(
        capsys.readouterr().out
    )


def test_no_cache_is_no_models(tmp_path: Path) -> None:
    assert list(cached_models(tmp_path / "none")) == []


def test_sizes_are_readable() -> None:
    assert [size(n) for n in (5, 5_300, 5_300_000, 1.5e9)] == ["5 B", "5 kB", "5.3 MB", "1.5 GB"]
