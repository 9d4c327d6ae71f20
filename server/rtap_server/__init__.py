"""The rtap HTTP service: vLLM's OpenAI server on an engine that thinks in recursive Think–Answer cycles."""

__version__ = "0.1.0"
