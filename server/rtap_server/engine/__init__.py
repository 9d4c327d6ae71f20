"""The recursive engine client and what it runs on: vLLM engines, confidence, request state."""
