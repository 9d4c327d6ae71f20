"""What training writes into a checkpoint's ``config.json`` under ``rtap``, and the server reads back.

It travels in ``config.json`` because that file comes along wherever a checkpoint goes. Unknown keys are kept out of
the way, not refused: an older server must load what a newer trainer wrote.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rtap_core.errors import ConfigError

_IN_WHEEL, _IN_CHECKOUT = Path(__file__).with_name("models"), Path(__file__).resolve().parents[2] / "deploy" / "models"
# The demo models: policy, confidence generator, student and evaluation questions, each a folder.
BUNDLED_MODELS = _IN_WHEEL if _IN_WHEEL.is_dir() else _IN_CHECKOUT
CERTAIN = 1e-6  # probabilities nearer to 0 or 1 count as this near
NUM_BINS = 20  # equal-width bins of [0, 1] in every calibration figure, the trainer's and the server's


def bin_of(value: float, bins: int) -> int:
    """Which of so many equal-width bins of [0, 1] it falls into."""
    return min(int(value * bins), bins - 1)


def bin_gaps(judged: Iterable[tuple[float, bool]]) -> list[float]:
    """Confidence minus right ones, summed in each of NUM_BINS: their sizes, over all, make the expected calibration
    error."""
    gaps = [0.0] * NUM_BINS
    for confidence, is_right in judged:
        gaps[bin_of(confidence, NUM_BINS)] += confidence - is_right
    return gaps


class Calibration(BaseModel):
    """How confidences of first cycles were distributed on held-out questions when the generator was trained.

    reference: shares (or counts) over equal-width bins of [0, 1].
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    reference: tuple[float, ...] = ()


class Fusion(BaseModel):
    """One confidence of two witnesses: the generator, which reads a cycle, and the policy, which was more or less sure
    of each token as it wrote it. The first sees a working that does not check, the second a slip in a sum.

    sigmoid(bias + generator · logit(p) + logprob_mean · mean + logprob_min · smallest), where p is the generator's
    probability and the log-probabilities are those of the cycle's sampled tokens before temperature and truncation.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    bias: float
    generator: float
    logprob_mean: float
    logprob_min: float

    @staticmethod
    def features(probability: float, mean: float, smallest: float) -> tuple[float, float, float, float]:
        """What is weighed, in the order of the weights above; training fits them to it."""
        p = min(max(probability, CERTAIN), 1.0 - CERTAIN)
        return 1.0, math.log(p / (1.0 - p)), mean, smallest

    def joined(self, probability: float, mean: float, smallest: float) -> float:
        """In [0, 1]."""
        weights = (self.bias, self.generator, self.logprob_mean, self.logprob_min)
        margin = sum(w * x for w, x in zip(weights, self.features(probability, mean, smallest), strict=True))
        return 1.0 / (1.0 + math.exp(-max(-700.0, min(700.0, margin))))

    def confidence(self, probability: float, logprobs: Sequence[float]) -> float:
        """In [0, 1]. ``logprobs``: at least one."""
        return self.joined(probability, sum(logprobs) / len(logprobs), min(logprobs))


class Artifact(BaseModel):
    """The ``rtap`` block. threshold: the one the trainer found best on validation questions. fusion: how scores are
    joined with log-probabilities; None leaves them alone."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: str | None = None
    cycle_open: str | None = None
    kind: str = "policy"
    threshold: float | None = Field(default=None, ge=0.0, le=1.0)
    calibration: Calibration = Calibration()
    fusion: Fusion | None = None


def read_artifact_file(file: Path) -> Artifact:
    """The block of a ``config.json`` that is not beside a model here. Raises ConfigError."""
    try:
        config: Any = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from error
    if not isinstance(config, dict) or "rtap" not in config:
        raise ConfigError(f"{file} has no rtap block; give the config.json that `rtap train confidence` wrote")
    return read_artifact(cast(dict[str, Any], config))


def is_classifier(config: Mapping[str, Any]) -> bool:
    """Whether a parsed ``config.json`` is that of a model which scores and writes nothing."""
    architectures = cast(list[str], config.get("architectures") or [])
    return any(name.endswith("ForSequenceClassification") for name in architectures)


def read_artifact(config: Mapping[str, Any]) -> Artifact:
    """The block of a parsed ``config.json``; empty for checkpoints that rtap did not train. Raises ConfigError."""
    try:
        return Artifact.model_validate(config.get("rtap") or {})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"the rtap block of config.json is wrong at {where or 'its root'}: {first['msg']}") from error
