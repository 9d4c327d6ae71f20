"""API keys: where they come from, what is refused, how a file is read again, and that nothing of them is told."""

import ast
import hashlib
import os
import re
from pathlib import Path

import pytest

from rtap_core.errors import ConfigError
from rtap_server.http import api_keys as keys_module
from rtap_server.http.admission import KeyLimits
from rtap_server.http.api_keys import KeyRing, load_keys

SECRET = re.compile(r"key\b|digest|presented|shown|secret", re.IGNORECASE)


def compared_secrets(source: str) -> list[str]:
    """Comparisons by ==, !=, in or not in whose operands are named like key material."""
    return [
        ast.unparse(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Compare)
        and any(isinstance(op, ast.Eq | ast.NotEq | ast.In | ast.NotIn) for op in node.ops)
        and SECRET.search(ast.unparse(node))
    ]


def test_key_material_is_compared_in_constant_time_only():
    source = Path(keys_module.__file__).read_text()
    assert not compared_secrets(source)
    assert source.count("hmac.compare_digest(") == 1


@pytest.mark.parametrize("line", ["key == given", "x.digest != y", "presented in keys", "d not in [k.digest]"])
def test_the_rule_would_see_it(line):
    assert compared_secrets(line)


def write(file: Path, text: str) -> Path:
    """A new version of ``file``, as an editor or a secret's mount makes one."""
    fresh = file.with_suffix(".new")
    fresh.write_text(text)
    os.replace(fresh, file)
    return file


def test_a_file_has_keys_with_limits_digests_and_a_scope(tmp_path):
    digest = hashlib.sha256(b"hashed").hexdigest()
    file = write(
        tmp_path / "keys.toml",
        f"""
        [[keys]]
        name = "team a"
        key = "plain"
        requests_per_minute = 60
        tokens_per_minute = 9000
        concurrent = 4
        [[keys]]
        name = "team b"
        sha256 = "{digest.upper()}"
        [[keys]]
        name = "prometheus"
        key = "scrape"
        scope = "metrics"
        """,
    )
    ring = load_keys(file, {})
    assert not ring.is_empty
    assert ring.guards_metrics
    first, second, third = (ring.find(key) for key in (b"plain", b"hashed", b"scrape"))
    assert first is not None
    assert second is not None
    assert third is not None
    assert (first.name, first.limits, first.opens_metrics_only) == ("team a", KeyLimits(60, 9000, 4), False)
    assert (second.name, second.limits) == ("team b", KeyLimits())
    assert third.opens_metrics_only
    for wrong in (b"", b"Plain", b"plain ", digest.encode(), b"\xff\xfe", b"x" * 65_536):
        assert ring.find(wrong) is None


def test_variables_are_keys_without_limits(tmp_path):
    ring = load_keys(None, {"RTAP_API_KEYS": "one, two,", "VLLM_API_KEY": "three"})
    assert [found.name for k in (b"one", b"two", b"three") if (found := ring.find(k))] == [
        "RTAP_API_KEYS 1",
        "RTAP_API_KEYS 2",
        "VLLM_API_KEY",
    ]
    assert not ring.guards_metrics
    assert load_keys(None, {}).is_empty
    assert load_keys(None, {"VLLM_API_KEY": ""}).is_empty  # as vLLM reads it
    file = write(tmp_path / "k", '[[keys]]\nname = "a"\nkey = "one"\nconcurrent = 1')
    limited = load_keys(file, {"RTAP_API_KEYS": "one"}).find(b"one")
    assert limited is not None
    assert limited.limits.concurrent == 1


@pytest.mark.parametrize("value", ["", " , ", "two words", "é"])
def test_a_variable_without_a_usable_key_does_not_open_the_server(value):
    with pytest.raises(ConfigError, match="RTAP_API_KEYS must be keys of printable ASCII"):
        load_keys(None, {"RTAP_API_KEYS": value})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "keys: Field required"),
        ("keys = []", "keys: List should have at least 1 item"),
        ('[[keys]]\nkey = "hush"', "keys.0.name: Field required"),
        ('[[keys]]\nname = "a"', "keys.0: give either key or sha256"),
        (f'[[keys]]\nname = "a"\nkey = "hush"\nsha256 = "{"a" * 64}"', "keys.0: give either key or sha256"),
        ('[[keys]]\nname = "a"\nsha256 = "hush"', "keys.0.sha256: String should match pattern"),
        ('[[keys]]\nname = "a"\nkey = "hush hush"', "keys.0.key: String should match pattern"),
        ('[[keys]]\nname = "a"\nkey = "hush"\nconcurrent = 0', "keys.0.concurrent: Input should be greater than"),
        ('[[keys]]\nname = "a"\nkey = "hush"\nlimit = 5', "keys.0.limit: Extra inputs are not permitted"),
        ('[[keys]]\nname = "a"\nkey = "hush"\nscope = "all"', "keys.0.scope: Input should be 'metrics'"),
        ('[[keys]]\nname = "a"\nkey = hush', "is not valid TOML (line 3)"),
        ('[[keys]]\nname = "a"\nkey = "hush"\n' * 2, "a name or a key is listed twice"),
        ('[[keys]]\nname = "a"\nkey = "hush"\nscope = "metrics"', "has only keys for /metrics"),
    ],
)
def test_a_broken_file_is_one_sentence_without_contents(text, sentence, tmp_path):
    with pytest.raises(ConfigError, match=re.escape(sentence)) as error:
        load_keys(write(tmp_path / "keys.toml", text), {})
    assert "hush" not in str(error.value)
    assert error.value.__suppress_context__ or error.value.__context__ is None


def test_a_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the API keys file .*: No such file"):
        load_keys(tmp_path / "none", {})


def test_a_changed_file_counts_within_a_second_and_a_broken_one_changes_nothing(tmp_path, capsys):
    now = 100.0
    file = write(tmp_path / "keys.toml", '[[keys]]\nname = "a"\nkey = "old"')
    ring = KeyRing([], file, clock=lambda: now)
    write(file, '[[keys]]\nname = "a"\nkey = "new"')
    assert ring.find(b"old") is not None  # not looked for yet
    now += 1.0
    assert ring.find(b"old") is None
    assert ring.find(b"new") is not None

    write(file, '[[keys]]\nname = "a"\nkey = "hush')
    for _ in range(3):
        now += 1.0
        assert ring.find(b"new") is not None
    file.unlink()
    for _ in range(3):
        now += 1.0
        assert ring.find(b"new") is not None
    told = capsys.readouterr().err
    assert told.count("the previous keys stay valid") == told.count("\n") == 2  # one a change
    assert "hush" not in told
    write(file, '[[keys]]\nname = "a"\nkey = "newest"')
    now += 1.0
    assert ring.find(b"newest") is not None
    assert ring.find(b"new") is None
