"""Config of ``rtap train sft``."""

from dataclasses import dataclass
from pathlib import Path

from rtap_core.errors import ConfigError
from rtap_training.config.settings import check_positive, setting
from rtap_training.config.supervised import SupervisedConfig

RIGHT, CORRECTIONS = "right", "corrections"


@dataclass(frozen=True, slots=True)
class SftConfig(SupervisedConfig):
    """Supervised training of any Hugging Face model: a cold start of R-TAP (sec. 3.1), or imitation of a teacher.

    Neither paper states values: all defaults are ours."""

    data: str = setting(
        CORRECTIONS,
        f"JSONL file of conversations (messages), or of samples: {CORRECTIONS} (each sample followed by a right one), "
        f"{RIGHT} (right samples alone; of a teacher: imitation)",
    )
    teacher: str = setting("", "model to sample instead of the policy: a folder or a Hugging Face name")
    output: Path = setting(Path("runs/sft"), "checkpoint or adapter to write; logs and checkpoints are in OUTPUT.run")
    rows_per_question: int = setting(4, "rows of each kind a question at most")
    kept_share: float = setting(0.5, "right first cycles, for each corrected one")
    confirmed_share: float = setting(0.5, "right cycles after a right one, for each corrected one")
    max_length: int = setting(2048, "longer rows are left out")

    def __post_init__(self) -> None:
        sources = bool(self.questions) + (self.samples_file is not None) + (self.data not in (RIGHT, CORRECTIONS))
        if sources != 1:
            raise ConfigError(
                f"data={self.data}, questions={self.questions!r} and samples_file={self.samples_file}: give {RIGHT} or "
                f"{CORRECTIONS} with questions to sample or with a samples_file, or a file of conversations alone"
            )
        if self.teacher and not self.questions:
            raise ConfigError(f"teacher={self.teacher} is sampled on questions: give them")
        SupervisedConfig.__post_init__(self)  # super() fails in a dataclass with slots
        check_positive(self, "rows_per_question", "max_length")
        for name in ("kept_share", "confirmed_share"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 0")
