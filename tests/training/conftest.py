"""Hypothesis settings: no deadline, because the machine may be busy."""

from hypothesis import settings

settings.register_profile("training", deadline=None)
settings.load_profile("training")
