"""The rtap block of config.json."""

import json
import math

import pytest

from rtap_core.artifact import Artifact, Fusion, read_artifact, read_artifact_file
from rtap_core.errors import ConfigError


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


def test_a_fusion_is_a_logistic_regression_on_the_two_witnesses():
    fusion = Fusion(**FUSION)
    margin = 0.5 + 2 * math.log(0.8 / 0.2) + 3 * -0.3 + 1 * -0.5
    assert fusion.confidence(0.8, [-0.1, -0.5, -0.3]) == pytest.approx(1 / (1 + math.exp(-margin)))
    weighed = zip(FUSION.values(), Fusion.features(0.8, -0.3, -0.5), strict=True)  # which training fits
    assert sum(weight * feature for weight, feature in weighed) == pytest.approx(margin)
    assert 0 < fusion.confidence(0.0, [-1e9]) < fusion.confidence(1.0, [0.0]) <= 1


def test_the_block_of_a_generator_elsewhere_is_read_from_its_file(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"rtap": {"threshold": 0.4, "fusion": FUSION}}))
    assert read_artifact_file(file) == Artifact(threshold=0.4, fusion=Fusion(**FUSION))
    for text, message in (("{", "cannot read"), ("[]", "no rtap block"), ("{}", "no rtap block")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_artifact_file(file)
    with pytest.raises(ConfigError, match="cannot read"):
        read_artifact_file(tmp_path / "absent.json")
    file.write_text(json.dumps({"rtap": {"fusion": {"bias": 1}}}))
    with pytest.raises(ConfigError, match=r"wrong at fusion\.generator"):
        read_artifact_file(file)
