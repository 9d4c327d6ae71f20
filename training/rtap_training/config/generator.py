"""Config of ``rtap train generator``."""

from dataclasses import dataclass
from pathlib import Path

from rtap_core.errors import ConfigError
from rtap_training.config.settings import check_positive, setting
from rtap_training.config.supervised import SupervisedConfig


@dataclass(frozen=True, slots=True)
class GeneratorConfig(SupervisedConfig):
    """Confidence generator for any Hugging Face model, trained on its samples.

    Defaults are for models of billions of parameters on a GPU; fields name R-TAP where a value is the paper's.
    """

    backbone: str = setting("", "model whose body is trained, in its own chat template. R-TAP app. A: the policy")
    num_layers: int = setting(0, "first layers of the backbone to keep; 0: all, as R-TAP app. A")
    output: Path = setting(Path("runs/generator"), "classifier or adapter to write; logs and checkpoints: OUTPUT.run")
    eval_questions: int = setting(200, "held-out questions at most, of the tenth that is held out by hash")
    samples: int = setting(8, "trajectories a question. R-TAP: 128")
    max_cycles: int = setting(2, "cycles a trajectory; a wrong cycle is followed by another")
    corruptions: int = setting(0, "questions more, with right, corrupted and unrelated workings; bundled tasks alone")
    equation_weight: float = setting(
        0.0, "loss of written equations (a token each: true so far?) next to the cycle's 1"
    )
    epochs: int = setting(2, "passes over the cycles")
    batch_size: int = setting(32, "distinct cycles an update")
    global_weight: float = setting(0.25, "weight of questions all right or all wrong")
    validation_share: float = setting(0.2, "training questions kept for calibration and threshold")
    seed: int = setting(2, "seed of questions, sampling, head weights and training order")

    def __post_init__(self) -> None:
        if bool(self.questions) == (self.samples_file is not None):
            raise ConfigError(
                f"questions={self.questions!r} and samples_file={self.samples_file}: give questions (a JSONL file, "
                "rg:NAME, hf:NAME or a bundled task) to sample the policy on, or the file, and not both"
            )
        SupervisedConfig.__post_init__(self)  # super() fails in a dataclass with slots
        check_positive(self, "eval_questions", "max_cycles")
        if self.num_layers < 0 or self.corruptions < 0:
            raise ConfigError(f"num_layers={self.num_layers} and corruptions={self.corruptions} must be at least 0")
        if self.equation_weight < 0:
            raise ConfigError(f"equation_weight={self.equation_weight} must be at least 0")
        if not 0 < self.validation_share < 1:
            raise ConfigError(f"validation_share={self.validation_share} must be between 0 and 1")
        if not 0 <= self.global_weight <= 1:
            raise ConfigError(f"global_weight={self.global_weight} must be in [0, 1]")
