"""The ``rtap`` block of a checkpoint's ``config.json``: written by training, read by the server.

``config.json`` accompanies a checkpoint wherever it is copied. Unknown keys are ignored, so that an older server loads
what a newer trainer wrote.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rtap_core.errors import ConfigError

_IN_WHEEL, _IN_CHECKOUT = Path(__file__).with_name("models"), Path(__file__).resolve().parents[2] / "deploy" / "models"
# Folders of the demo: policy, confidence generator, student, evaluation questions.
BUNDLED_MODELS = _IN_WHEEL if _IN_WHEEL.is_dir() else _IN_CHECKOUT
CERTAIN = 1e-6  # probabilities are clamped to [CERTAIN, 1 - CERTAIN] before their logit
NUM_BINS = 20  # equal-width bins of [0, 1] for calibration, in training and on the server


def bin_of(value: float, bins: int) -> int:
    """Index of the equal-width bin of [0, 1] that contains ``value``."""
    return min(int(value * bins), bins - 1)


def bin_gaps(judged: Iterable[tuple[float, bool]]) -> list[float]:
    """Sum of (confidence - correctness) in each of NUM_BINS bins, from pairs (confidence, is_right).

    The sum of their absolute values over the number of pairs is the expected calibration error."""
    gaps = [0.0] * NUM_BINS
    for confidence, is_right in judged:
        gaps[bin_of(confidence, NUM_BINS)] += confidence - is_right
    return gaps


class Calibration(BaseModel):
    """Reference distribution of first-cycle confidences on held-out questions, from training.

    reference: shares or counts over equal-width bins of [0, 1]; empty if unknown.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    reference: tuple[float, ...] = ()


class Fusion(BaseModel):
    """Logistic regression that joins the generator's probability p with the policy's log-probabilities.

    confidence = sigmoid(bias + generator · logit(p) + logprob_mean · mean + logprob_min · min), with mean and min over
    the cycle's sampled tokens (nats, before temperature and truncation).
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    bias: float
    generator: float
    logprob_mean: float
    logprob_min: float

    @staticmethod
    def features(probability: float, mean: float, smallest: float) -> tuple[float, float, float, float]:
        """Inputs of the regression, in the order of the weights: 1, logit(p), mean, min."""
        p = min(max(probability, CERTAIN), 1.0 - CERTAIN)
        return 1.0, math.log(p / (1.0 - p)), mean, smallest

    def joined(self, probability: float, mean: float, smallest: float) -> float:
        """Confidence in [0, 1] from the mean and the smallest log-probability."""
        weights = (self.bias, self.generator, self.logprob_mean, self.logprob_min)
        margin = sum(w * x for w, x in zip(weights, self.features(probability, mean, smallest), strict=True))
        return 1.0 / (1.0 + math.exp(-max(-700.0, min(700.0, margin))))

    def confidence(self, probability: float, logprobs: Sequence[float]) -> float:
        """Confidence in [0, 1]. ``logprobs``: of the sampled tokens, at least one."""
        return self.joined(probability, sum(logprobs) / len(logprobs), min(logprobs))


class Artifact(BaseModel):
    """The ``rtap`` block.

    kind: ``policy`` or ``confidence``. threshold: best on the trainer's validation questions.
    fusion: joins scores with log-probabilities; None: scores are used as they are."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: str | None = None
    cycle_open: str | None = None
    kind: str = "policy"
    threshold: float | None = Field(default=None, ge=0.0, le=1.0)
    calibration: Calibration = Calibration()
    fusion: Fusion | None = None


def read_artifact_file(file: Path) -> Artifact:
    """The block of a ``config.json`` file without its model. Raises ConfigError."""
    try:
        config: Any = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from error
    if not isinstance(config, dict) or "rtap" not in config:
        raise ConfigError(f"{file} has no rtap block; give the config.json that `rtap train confidence` wrote")
    return read_artifact(cast(dict[str, Any], config))


def is_classifier(config: Mapping[str, Any]) -> bool:
    """True if a parsed ``config.json`` belongs to a sequence classifier, which scores and does not generate."""
    architectures = cast(list[str], config.get("architectures") or [])
    return any(name.endswith("ForSequenceClassification") for name in architectures)


def read_artifact(config: Mapping[str, Any]) -> Artifact:
    """The block of a parsed ``config.json``; all defaults if it has none. Raises ConfigError."""
    try:
        return Artifact.model_validate(config.get("rtap") or {})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"the rtap block of config.json is wrong at {where or 'its root'}: {first['msg']}") from error
