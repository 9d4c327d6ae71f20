"""Samplers, and the files that keep what they sampled."""
