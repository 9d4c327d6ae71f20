"""Settings: precedence, validation sentences, refused names."""

import argparse
import re

import pytest

from rtap_core.errors import ConfigError
from rtap_core.types import Policy
from rtap_server.settings import REMOVED, Settings, add_flags, load_settings


def _load(argv: list[str], environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return load_settings(vars(parser.parse_args(argv)), environ)


def test_a_flag_wins_over_the_environment_and_that_over_the_default(monkeypatch):
    environ = {"RTAP_THRESHOLD": "0.7", "RTAP_MAX_CYCLES": "3"}
    settings = _load(["--threshold", "0.9"], environ, monkeypatch)
    assert (settings.threshold, settings.max_cycles, settings.samples) == (0.9, 3, 8)


def test_every_field_has_a_flag_and_a_variable(monkeypatch):
    parser = argparse.ArgumentParser()
    add_flags(parser)
    flags = {a.dest for a in parser._actions}
    assert {f"rtap_{name}" for name in Settings.model_fields} <= flags
    assert _load(["--deadline", "5"], {}, monkeypatch).deadline_seconds == 5.0
    assert _load([], {"RTAP_POLICY": "vote"}, monkeypatch).policy is Policy.VOTE


def test_keys_have_a_variable_and_no_flag(monkeypatch):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(parser)
    assert "--api-keys" not in parser._option_string_actions
    assert _load([], {"RTAP_API_KEYS": "a,b"}, monkeypatch).api_keys_file is None


def test_an_unknown_variable_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match=r"RTAP_TRESHOLD \(did you mean RTAP_THRESHOLD\?\); fix or unset them: `rtap"):
        _load([], {"RTAP_TRESHOLD": "0.5"}, monkeypatch)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--threshold", "1.5"], "--threshold (or RTAP_THRESHOLD)='1.5': Input should be less than or equal to 1"),
        (["--threshold", "high"], "--threshold (or RTAP_THRESHOLD)='high': Input should be a valid number"),
        (["--max-cycles", "0"], "--max-cycles (or RTAP_MAX_CYCLES)='0': Input should be greater than or equal to 1"),
        (["--max-cycles", "20"], "max_cycles=20 is above max_cycles_limit=16; raise the limit or lower max_cycles"),
        (["--policy", "sure"], "--policy (or RTAP_POLICY)='sure': Input should be 'confidence', 'model', 'single' or"),
        (["--policy", "confidence"], "policy=confidence needs a generator"),
        (["--confidence", "pooling"], "confidence=pooling needs confidence_model"),
        (["--confidence", "remote", "--confidence-model", "/x"], "confidence=remote needs a http(s) address"),
        (["--confidence-config", "c.json"], "confidence_config needs a confidence"),
        (["--confidence-engine-args", "{"], "--confidence-engine-args is not JSON"),
        (["--confidence-input", "chat"], "confidence_input needs confidence=pooling or remote, not none"),
        (["--confidence-engine-args", "[1]"], "--confidence-engine-args must be a JSON object"),
    ],
)
def test_bad_values_are_one_sentence_that_names_them(argv, sentence, monkeypatch):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        _load(argv, {}, monkeypatch)


def test_auto_confidence_is_decided_by_the_model(monkeypatch):
    kinds = [_load(a, {}, monkeypatch).confidence_kind for a in ([], ["--confidence-model", "/m"])]
    url = _load(["--confidence-model", "http://127.0.0.1:9"], {}, monkeypatch)
    assert [*kinds, url.confidence_kind] == ["none", "pooling", "remote"]
    assert _load(["--confidence", "logprob", "--confidence-model", "/m"], {}, monkeypatch).confidence_kind == "logprob"


def test_a_variable_that_is_no_json_is_one_sentence(monkeypatch):
    with pytest.raises(ConfigError, match="is it valid JSON"):
        _load([], {"RTAP_CONFIDENCE_ENGINE_ARGS": "{"}, monkeypatch)


@pytest.mark.parametrize("flag", REMOVED)
def test_a_removed_variable_is_refused_with_its_sentence(flag):
    assert flag[2:].replace("-", "_") not in Settings.model_fields
    name = f"RTAP_{flag[2:].replace('-', '_').upper()}"
    with pytest.raises(ConfigError, match=f"^{re.escape(f'{name} was removed: {REMOVED[flag]}')}$"):
        load_settings({}, {name: "1", "RTAP_AAA": "1"})
