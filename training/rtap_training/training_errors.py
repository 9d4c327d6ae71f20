"""Errors of training beyond wrong settings; the tree's root is ``rtap_core.errors.RtapError``."""

from rtap_core.errors import RtapError


class TrainingError(RtapError):
    """A run that cannot go on. The message says where it stopped and which checkpoint is the last good one."""


class TeacherError(RtapError):
    """A teacher that cannot score this student's rollouts, or gave no usable scores."""
