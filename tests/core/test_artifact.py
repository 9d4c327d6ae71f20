"""The rtap block of config.json."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtap_core.artifact import Artifact, Logistic, read_artifact, read_artifact_file
from rtap_core.errors import ConfigError
from rtap_core.features import LogprobFeatures


def test_a_checkpoint_without_block_is_empty_and_unknown_keys_pass():
    assert read_artifact({}) == Artifact()
    got = read_artifact(
        {"rtap": {"format": "rtap", "threshold": 0.6, "future": 1, "calibration": {"reference": [1, 2]}}}
    )
    assert (got.format, got.threshold, got.calibration.reference) == ("rtap", 0.6, (1.0, 2.0))


@pytest.mark.parametrize("block", [{"threshold": 2}, {"threshold": "x"}, [1]])
def test_a_wrong_block_is_one_sentence(block):
    with pytest.raises(ConfigError, match=r"the rtap block of config.json is wrong at"):
        read_artifact({"rtap": block})


FUSION = {"bias": 0.5, "generator": 2.0, "logprob_mean": 3.0, "logprob_min": 1.0}
KNOWN = LogprobFeatures(-0.3, -0.5, -0.45, -0.2, 20)


def test_a_logistic_weighs_score_and_log_probabilities():
    fusion = Logistic(**FUSION)
    margin = 0.5 + 2 * math.log(0.8 / 0.2) + 3 * -0.3 + 1 * -0.5
    assert fusion.confidence(0.8, KNOWN) == pytest.approx(1 / (1 + math.exp(-margin)))
    whole = Logistic(bias=-19, probability_mean=5, probability_lowest_tenth=2, probability_answer=3, log_tokens=4)
    margin = 1 + 5 * math.exp(-0.3) + 2 * math.exp(-0.45) + 3 * math.exp(-0.2) + 4 * math.log(20) - 20
    assert whole.confidence(None, KNOWN) == pytest.approx(1 / (1 + math.exp(-margin)))
    assert Logistic(bias=0, generator=1).confidence(0.3, None) == pytest.approx(0.3)
    assert [one.reads_logprobs for one in (fusion, whole, Logistic(bias=0, generator=1))] == [True, True, False]
    assert 0 < fusion.confidence(0.0, KNOWN) < fusion.confidence(1.0, KNOWN) <= 1


# No probability in between comes within 1e-6 of 0 or 1, where its logit is cut.
@given(*[st.floats(-3, 3)] * 5, st.floats(0.05, 0.95))
def test_two_regressions_in_a_row_are_one(bias, generator, mean, slope, offset, score):
    first, platt = Logistic(bias=bias, generator=generator, logprob_mean=mean), Logistic(bias=offset, generator=slope)
    both = platt.confidence(first.confidence(score, KNOWN), None)
    assert first.then(platt).confidence(score, KNOWN) == pytest.approx(both, abs=1e-4)


def test_the_block_of_a_generator_elsewhere_is_read_from_its_file(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"rtap": {"threshold": 0.4, "fusion": FUSION}}))
    assert read_artifact_file(file) == Artifact(threshold=0.4, logistic=Logistic(**FUSION))
    file.write_text(json.dumps({"rtap": {"threshold": 0.4, "logistic": FUSION}}))
    assert read_artifact_file(file).logistic == Logistic(**FUSION)
    for text, message in (("{", "cannot read"), ("[]", "no rtap block"), ("{}", "no rtap block")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_artifact_file(file)
    with pytest.raises(ConfigError, match="cannot read"):
        read_artifact_file(tmp_path / "absent.json")


@pytest.mark.parametrize("wrong", [{}, {"bias": math.nan}, {"bias": 1, "logprob_mean": math.inf}, {"bias": 1, "x": 1}])
def test_wrong_weights_are_one_sentence_with_their_file(tmp_path, wrong):
    file = tmp_path / "confidence.json"
    file.write_text(json.dumps({"rtap": {"logistic": wrong}}))
    with pytest.raises(ConfigError, match=r"the rtap block of .*confidence\.json is wrong at logistic\.\w+: "):
        read_artifact_file(file)


def test_confidences_are_calibrated_if_they_were_fitted():
    calibrated = [{"fusion": FUSION}, {"logistic": FUSION}, {"calibration": {"reference": [1, 2]}}]
    assert all(read_artifact({"rtap": block}).is_calibrated for block in calibrated)
    assert not any(read_artifact({"rtap": block}).is_calibrated for block in ({}, {"threshold": 0.6}))
