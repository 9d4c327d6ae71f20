"""Settings of an evaluation: rules to measure, server, questions, load."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtap_core.errors import ConfigError
from rtap_training.evaluation.client import Load
from rtap_training.evaluation.records import RunSpec
from rtap_training.evaluation.results import RuleParameters
from rtap_training.evaluation.rules import ADAPTIVE, CGES, CONFIDENCE, MODEL, SINGLE, VOTE


@dataclass(frozen=True, slots=True)
class EvaluationConfig:
    """Settings of one evaluation.

    rules: None for all that the server can measure. sources, prompt, limit, split: see ``load_questions``.
    server: address of a running server; None: one is started for ``model`` (None: the bundled models) with
    ``serve_flags``. kept: files of samples to replay rules on, without a server, with confidences computed by
    ``confidence_config``, or by the generator ``confidence_model`` of ``model``. rounds: number of parts into which
    the questions are split; the rules alternate part by part. command: command line, for the report.
    """

    rules: frozenset[str] | None
    parameters: RuleParameters
    load: Load
    sources: tuple[str, ...]
    prompt: str | None
    limit: int | None
    split: str | None
    kept: tuple[Path, ...]
    confidence_config: Path | None
    server: str | None
    model: str | None
    confidence_model: str | None
    serve_flags: tuple[str, ...]
    api_key: str | None
    timeout_seconds: float
    ready_seconds: float
    rounds: int
    output: Path
    resume: bool
    command: str

    def __post_init__(self) -> None:
        """Raise ConfigError for contradictory settings."""
        if self.server is not None and (self.model is not None or self.confidence_model is not None):
            raise ConfigError("--server uses a running server, --model starts one; give only one of them")
        if self.server is not None and self.serve_flags:
            raise ConfigError("flags after -- apply to a server started by rtap eval; omit them with --server")
        if self.confidence_config is not None and not self.kept:
            raise ConfigError("--confidence-config needs --from-samples; a server takes it among the flags after --")
        if self.kept and self.sources:
            raise ConfigError("--from-samples has its own questions; omit --questions")
        if self.kept and (self.server is not None or self.serve_flags):
            raise ConfigError("--from-samples needs no server; omit --server and flags after --")
        if self.kept and (self.model is None) != (self.confidence_model is None):
            raise ConfigError(
                "--from-samples needs no MODEL, or with --confidence-model the one that wrote the samples: give both, "
                "to score the samples, or neither"
            )
        if self.confidence_config is not None and self.confidence_model is not None:
            raise ConfigError("kept samples are scored by --confidence-model or --confidence-config; give one of them")

    def specs(self, served: Mapping[str, Any]) -> list[RunSpec]:
        """Rules to run on the server. served: reply of GET /v1/rtap/config. Raises ConfigError if it cannot."""
        limits, kind = served["limits"], served["confidence"]["kind"]
        cycles, samples = self.load.max_cycles, max(self.parameters.samples)
        rules = self.rules
        if rules is None:
            rules = {SINGLE, VOTE, ADAPTIVE} if kind == "none" else {SINGLE, MODEL, CONFIDENCE, VOTE, ADAPTIVE}
        if cycles is not None and cycles > limits["max_cycles"]:
            raise ConfigError(f"--max-cycles {cycles} is above the server's limit of {limits['max_cycles']}")
        if rules & {VOTE, ADAPTIVE} and samples > limits["samples"]:
            raise ConfigError(f"--samples {samples} is above the server's limit of {limits['samples']}")
        if CONFIDENCE in rules and kind == "none":
            raise ConfigError(
                "the server has no confidence; start it with --confidence-model or --confidence, or omit confidence "
                "from --policies"
            )
        adaptive = CGES if served["confidence"]["is_calibrated"] else ADAPTIVE
        specs = {
            SINGLE: [RunSpec(SINGLE)],
            CONFIDENCE: [RunSpec(CONFIDENCE, threshold=t) for t in self.parameters.thresholds],
            MODEL: [RunSpec(MODEL)],
            VOTE: [RunSpec(VOTE, samples=samples)],
            ADAPTIVE: [RunSpec(adaptive, self.parameters.vote_thresholds[0], samples)],
        }
        return [spec for rule, of_rule in specs.items() if rule in rules for spec in of_rule]
