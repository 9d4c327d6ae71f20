"""Questions, sampled trajectories, and labelled cycles."""
