"""Property tests here have no deadline: the machine may be training or serving at the same time."""

from hypothesis import settings

settings.register_profile("training", deadline=None)
settings.load_profile("training")
