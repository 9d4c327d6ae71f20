"""Settings of each training command."""
