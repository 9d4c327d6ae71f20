"""Reinforcement learning on TRL's GRPOTrainer: recursive rollouts, the five R-TAP rewards, TRRD and its baselines."""
