"""Trajectory format, stop decisions and the Think–Answer loop, shared by server and training. No web, no engine."""
