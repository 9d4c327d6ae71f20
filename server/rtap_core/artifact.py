"""The ``rtap`` block of a checkpoint's ``config.json``: written by training, read by the server.

``config.json`` accompanies a checkpoint wherever it is copied. Unknown keys are ignored, so that an older server loads
what a newer trainer wrote.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from rtap_core.errors import ConfigError
from rtap_core.features import LogprobFeatures

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


class Logistic(BaseModel):
    """Logistic regression: confidence = sigmoid(bias + Σ weight · feature). A weight of 0 leaves its feature out.

    generator: weight of the logit of a generator's score; alone it is a Platt calibration. logprob_…: of
    log-probabilities. probability_…: of the exponentials of such means, which a few unlikely tokens cannot dominate;
    their Brier score on kept samples was lower. log_tokens: of the logarithm of the number of tokens."""

    # Unknown weights are an error, unlike unknown keys elsewhere: without them every confidence would be wrong.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    bias: float
    generator: float = 0.0
    logprob_mean: float = 0.0
    logprob_min: float = 0.0
    probability_mean: float = 0.0
    probability_lowest_tenth: float = 0.0
    probability_answer: float = 0.0
    log_tokens: float = 0.0

    @staticmethod
    def inputs(score: float | None, logprobs: LogprobFeatures | None) -> dict[str, float]:
        """Features by the names of their weights. score: of the generator."""
        known = {"bias": 1.0}
        if score is not None:
            p = min(max(score, CERTAIN), 1.0 - CERTAIN)
            known["generator"] = math.log(p / (1.0 - p))
        if logprobs is not None:
            known |= {
                "logprob_mean": logprobs.mean,
                "logprob_min": logprobs.lowest,
                "probability_mean": math.exp(logprobs.mean),
                "probability_lowest_tenth": math.exp(logprobs.lowest_tenth),
                "probability_answer": math.exp(logprobs.answer),
                "log_tokens": math.log(logprobs.tokens),
            }
        return known

    @property
    def reads_logprobs(self) -> bool:
        """True if it needs more than a generator's score."""
        return any(weight for name, weight in self if name not in ("bias", "generator"))

    def confidence(self, score: float | None, logprobs: LogprobFeatures | None) -> float:
        """Confidence in [0, 1]. Every feature with a weight must be given."""
        known = self.inputs(score, logprobs)
        margin = sum(weight * known[name] for name, weight in self if weight)
        return 1.0 / (1.0 + math.exp(-max(-700.0, min(700.0, margin))))

    def then(self, platt: "Logistic") -> "Logistic":
        """This regression followed by a Platt calibration of its result, as one."""
        weights = {name: weight * platt.generator for name, weight in self}
        return Logistic(**weights | {"bias": weights["bias"] + platt.bias})


# Weights of log-probability features that `rtap calibrate` and `rtap train generator` fit.
LOGPROB_WEIGHTS = ("probability_mean", "probability_lowest_tenth", "probability_answer", "log_tokens")
# For confidence=logprob without a fitted one. Of Qwen2.5-Coder-0.5B-Instruct on sums: it ranks answers, and gives no
# probabilities of other models and tasks.
UNCALIBRATED = Logistic(bias=-3.0, probability_mean=1.0, probability_lowest_tenth=1.0, probability_answer=3.0)


class Artifact(BaseModel):
    """The ``rtap`` block.

    kind: ``policy`` or ``confidence``. threshold: best on the trainer's validation questions.
    logistic: computes confidence from scores and log-probabilities (``fusion`` in older files); None: scores are used
    unchanged. source: the kind of confidence for which ``rtap calibrate`` fitted it; None in a generator's own config.
    input: what a generator was trained to read; None: unknown.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: str | None = None
    cycle_open: str | None = None
    kind: str = "policy"
    threshold: float | None = Field(default=None, ge=0.0, le=1.0)
    calibration: Calibration = Calibration()
    logistic: Logistic | None = Field(default=None, validation_alias=AliasChoices("logistic", "fusion"))
    source: str | None = None
    input: Literal["token_ids", "chat"] | None = None

    @property
    def is_calibrated(self) -> bool:
        """True if confidences are probabilities: scores were fitted to right and wrong answers."""
        return self.logistic is not None or bool(self.calibration.reference)


def read_artifact_file(file: Path) -> Artifact:
    """The block of a JSON file: of ``rtap calibrate``, or a generator's ``config.json``. Raises ConfigError."""
    try:
        config: Any = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from error
    if not isinstance(config, dict) or "rtap" not in config:
        raise ConfigError(
            f"{file} has no rtap block; give a file that `rtap calibrate` wrote, or a generator's config.json"
        )
    return read_artifact(cast(dict[str, Any], config), where=str(file))


def is_classifier(config: Mapping[str, Any]) -> bool:
    """True if a parsed ``config.json`` belongs to a sequence classifier, which scores and does not generate."""
    architectures = cast(list[str], config.get("architectures") or [])
    return any(name.endswith("ForSequenceClassification") for name in architectures)


def read_artifact(config: Mapping[str, Any], *, where: str = "config.json") -> Artifact:
    """The block of a parsed ``config.json``; all defaults if it has none. Raises ConfigError."""
    try:
        return Artifact.model_validate(config.get("rtap") or {})
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(str(part) for part in first["loc"]) or "its root"
        raise ConfigError(f"the rtap block of {where} is wrong at {at}: {first['msg']}") from error
