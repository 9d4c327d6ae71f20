"""Which rules an evaluation runs, on which server, and with which settings. Decided before anything is started."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rtap_core.errors import ConfigError
from rtap_training.evaluation.client import Load
from rtap_training.evaluation.records import Run, RunSpec
from rtap_training.evaluation.rules import CONFIDENCE, GENERATOR, MODEL, OWN_SERVER, SINGLE, VOTE

# Quantiles of a model's own confidence taken as thresholds when none are given: its scale is not known beforehand.
OWN_QUANTILES = (0.25, 0.5, 0.75)


@dataclass(frozen=True, slots=True)
class RuleSelection:
    """Which rules to run. samples: sizes of votes; only the largest is asked for, the others are its prefixes.
    own_thresholds: of each rule of OWN_SERVER; none means OWN_QUANTILES."""

    rules: frozenset[str]
    thresholds: tuple[float, ...]
    own_thresholds: Mapping[str, tuple[float, ...]]
    samples: tuple[int, ...]

    def on_generator(self) -> list[RunSpec]:
        """Runs on the server with the confidence generator."""
        specs = [RunSpec(SINGLE)] if SINGLE in self.rules else []
        specs += [RunSpec(CONFIDENCE, threshold=t) for t in self.thresholds if CONFIDENCE in self.rules]
        specs += [RunSpec(MODEL)] if MODEL in self.rules else []
        return [*specs, RunSpec(VOTE, samples=max(self.samples))] if VOTE in self.rules else specs

    def own_servers(self) -> list[str]:
        """The rules that need a server of their own."""
        return [rule for rule in OWN_SERVER if rule in self.rules]

    def first_on(self, rule: str) -> list[RunSpec]:
        """First runs on the server of this rule: its thresholds may come from what these tell."""
        needed = VOTE in self.rules or not self.own_thresholds.get(rule)
        return [RunSpec(VOTE, samples=max(self.samples), scored_by=rule)] if needed else []

    def then_on(self, rule: str, vote: Run | None) -> list[RunSpec]:
        """The rule at its thresholds, taken from the scores in ``vote`` where none were given."""
        thresholds: Sequence[float] = self.own_thresholds.get(rule, ())
        if not thresholds and vote is not None:
            scores = [c.confidence for o in vote.answered for c in o.cycles if c.confidence is not None]
            if not scores:
                raise ConfigError(f"the {rule} server gives no confidence; start it with --confidence {rule}")
            thresholds = sorted({float(value) for value in np.quantile(scores, OWN_QUANTILES)})
        return [RunSpec(rule, threshold=threshold, scored_by=rule) for threshold in thresholds]

    def check_server(self, config: Mapping[str, Any], load: Load, *, wants: str) -> None:
        """Raise ConfigError where the server could only refuse these settings, or would measure something else.

        config: its GET /v1/rtap/config. wants: GENERATOR or one of OWN_SERVER, where its confidence should come from.
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
                "--confidence-model, or leave confidence out of --policies"
            )


@dataclass(frozen=True, slots=True)
class EvaluationConfig:
    """One evaluation. server, own_servers (by rule): addresses of running servers; without, one is started for
    ``model`` (None: the bundled models) with ``serve_flags``. token_budget: share of the vote's tokens that the chosen
    threshold may spend. command: what was typed, for the report."""

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
        """Raise ConfigError for settings that contradict each other."""
        if self.server is not None and (self.model is not None or self.confidence_model is not None):
            raise ConfigError("--server asks a running server, --model starts one; give only one of the two")
        if self.server is not None and self.serve_flags:
            raise ConfigError("flags after -- are for a server that is started here; leave them out with --server")
        if self.own_servers and self.server is None:
            flag = f"--{next(iter(self.own_servers))}-server"
            raise ConfigError(f"{flag} goes with --server; with --model that server is started for you")
        missing = [rule for rule in self.rules.own_servers() if rule not in self.own_servers]
        if missing and self.server is not None:
            raise ConfigError(
                f"policy {missing[0]} needs a second server: start one with `rtap serve … --confidence {missing[0]}` "
                f"and give its address as --{missing[0]}-server"
            )
