"""Implementation of ``rtap eval``."""
