"""Converged trajectories, their estimated error, and where they end."""
