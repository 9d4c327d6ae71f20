"""HTTP around vLLM's routes: authentication, limits, request fields, response rewriting, errors."""
