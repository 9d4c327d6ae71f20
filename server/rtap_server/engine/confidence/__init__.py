"""Confidence sources: a pooling engine, a remote classifier, the policy itself (yes or no), or its log-probabilities.

Each implements ``rtap_core.types.Confidence`` and raises ConfidenceError when it has no score.
"""
