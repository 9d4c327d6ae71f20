"""The routes that are ours: scoring and configuration under ``/v1/rtap``, liveness and readiness."""
