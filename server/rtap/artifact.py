"""What training writes into a checkpoint's ``config.json`` under ``rtap``, and the server reads back.

It travels in ``config.json`` because that file comes along wherever a checkpoint goes. Unknown keys are kept out of
the way, not refused: an older server must load what a newer trainer wrote.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from server.rtap.errors import ConfigError

NUM_BINS = 20  # equal-width bins of [0, 1] in every calibration figure, the trainer's and the server's


class Calibration(BaseModel):
    """How confidences of first cycles were distributed on held-out questions when the generator was trained.

    reference: shares (or counts) over equal-width bins of [0, 1].
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    reference: tuple[float, ...] = ()


class Artifact(BaseModel):
    """The ``rtap`` block. ``threshold`` is the one the trainer found best on held-out questions."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: str | None = None
    cycle_open: str | None = None
    kind: str = "policy"
    threshold: float | None = Field(default=None, ge=0.0, le=1.0)
    calibration: Calibration = Calibration()


def read_artifact(config: Mapping[str, Any]) -> Artifact:
    """The block of a parsed ``config.json``; empty for checkpoints that rtap did not train. Raises ConfigError."""
    try:
        return Artifact.model_validate(config.get("rtap") or {})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"the rtap block of config.json is wrong at {where or 'its root'}: {first['msg']}") from error
