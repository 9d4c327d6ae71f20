"""What server and training share: trajectory format, stop decisions and the Think–Answer loop. No fastapi, no vLLM."""
