"""Settings of an evaluation: rules to measure, servers, questions, load."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rtap_core.errors import ConfigError
from rtap_training.evaluation.client import Load
from rtap_training.evaluation.records import Run, RunSpec
from rtap_training.evaluation.rules import CONFIDENCE, GENERATOR, MODEL, OWN_SERVER, SINGLE, VOTE

# Default thresholds of a model's own confidence: quantiles of its scores, because their scale is unknown.
OWN_QUANTILES = (0.25, 0.5, 0.75)


@dataclass(frozen=True, slots=True)
class RuleSelection:
    """Rules to measure and their parameters.

    own_thresholds: by rule of OWN_SERVER; an empty tuple means OWN_QUANTILES. samples: vote sizes; only the largest is
    requested, smaller votes are prefixes of it.
    """

    rules: frozenset[str]
    thresholds: tuple[float, ...]
    own_thresholds: Mapping[str, tuple[float, ...]]
    samples: tuple[int, ...]

    def on_generator(self) -> list[RunSpec]:
        """Runs on the server with a confidence generator."""
        specs = [RunSpec(SINGLE)] if SINGLE in self.rules else []
        specs += [RunSpec(CONFIDENCE, threshold=t) for t in self.thresholds if CONFIDENCE in self.rules]
        specs += [RunSpec(MODEL)] if MODEL in self.rules else []
        return [*specs, RunSpec(VOTE, samples=max(self.samples))] if VOTE in self.rules else specs

    def own_servers(self) -> list[str]:
        """Rules that need a separate server."""
        return [rule for rule in OWN_SERVER if rule in self.rules]

    def first_on(self, rule: str) -> list[RunSpec]:
        """First runs on the server of ``rule``; its default thresholds are computed from their scores."""
        needed = VOTE in self.rules or not self.own_thresholds.get(rule)
        return [RunSpec(VOTE, samples=max(self.samples), scored_by=rule)] if needed else []

    def then_on(self, rule: str, vote: Run | None) -> list[RunSpec]:
        """Runs of ``rule`` at its thresholds, or at quantiles of the scores in ``vote``."""
        thresholds: Sequence[float] = self.own_thresholds.get(rule, ())
        if not thresholds and vote is not None:
            scores = [c.confidence for o in vote.answered for c in o.cycles if c.confidence is not None]
            if not scores:
                raise ConfigError(f"the {rule} server returns no confidence; start it with --confidence {rule}")
            thresholds = sorted({float(value) for value in np.quantile(scores, OWN_QUANTILES)})
        return [RunSpec(rule, threshold=threshold, scored_by=rule) for threshold in thresholds]

    def check_server(self, config: Mapping[str, Any], load: Load, *, wants: str) -> None:
        """Raise ConfigError if the server would refuse these settings or uses another kind of confidence.

        config: reply of GET /v1/rtap/config. wants: expected source of confidence, GENERATOR or one of OWN_SERVER.
        """
        limits, kind = config["limits"], config["confidence"]["kind"]
        if load.max_cycles is not None and load.max_cycles > limits["max_cycles"]:
            raise ConfigError(f"--max-cycles {load.max_cycles} is above the server's limit of {limits['max_cycles']}")
        votes = VOTE in self.rules or (wants != GENERATOR and bool(self.first_on(wants)))
        if votes and max(self.samples) > limits["samples"]:
            raise ConfigError(f"--samples {max(self.samples)} is above the server's limit of {limits['samples']}")
        if wants != GENERATOR and kind != wants:
            raise ConfigError(f"the {wants} server's confidence is {kind!r}; start it with --confidence {wants}")
        if wants == GENERATOR and CONFIDENCE in self.rules and kind in (*OWN_SERVER, "none"):
            raise ConfigError(
                f"the server has no confidence generator (its confidence is {kind!r}); start it with "
                "--confidence-model, or omit confidence from --policies"
            )


@dataclass(frozen=True, slots=True)
class EvaluationConfig:
    """Settings of one evaluation.

    server, own_servers (by rule): addresses of running servers; if None, a server is started for ``model`` (None: the
    bundled models) with ``serve_flags``. token_budget: share of the vote's tokens that the chosen threshold may spend.
    command: command line, for the report.
    """

    rules: RuleSelection
    load: Load
    questions: tuple[Path, ...]
    limit: int | None
    server: str | None
    own_servers: Mapping[str, str]
    model: str | None
    confidence_model: str | None
    serve_flags: tuple[str, ...]
    api_key: str | None
    timeout_seconds: float
    ready_seconds: float
    token_budget: float
    output: Path
    resume: bool
    command: str

    def __post_init__(self) -> None:
        """Raise ConfigError for contradictory settings."""
        if self.server is not None and (self.model is not None or self.confidence_model is not None):
            raise ConfigError("--server uses a running server, --model starts one; give only one of them")
        if self.server is not None and self.serve_flags:
            raise ConfigError("flags after -- apply to a server started by rtap eval; omit them with --server")
        if self.own_servers and self.server is None:
            flag = f"--{next(iter(self.own_servers))}-server"
            raise ConfigError(f"{flag} needs --server; with --model rtap eval starts that server itself")
        missing = [rule for rule in self.rules.own_servers() if rule not in self.own_servers]
        if missing and self.server is not None:
            raise ConfigError(
                f"policy {missing[0]} needs a second server: start one with `rtap serve … --confidence {missing[0]}` "
                f"and give its address as --{missing[0]}-server"
            )
