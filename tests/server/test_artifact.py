"""The rtap block of config.json."""

import pytest

from server.rtap.artifact import Artifact, read_artifact
from server.rtap.errors import ConfigError


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
