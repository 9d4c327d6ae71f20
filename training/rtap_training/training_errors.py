"""Training errors. Wrong settings raise ``rtap_core.errors.ConfigError`` instead."""

from rtap_core.errors import RtapError


class TrainingError(RtapError):
    """A run that cannot continue. The message names the step and the last good checkpoint."""


class TeacherError(RtapError):
    """A teacher that cannot score the student's rollouts, or returned unusable scores."""
