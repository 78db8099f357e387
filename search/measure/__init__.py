"""Measurements of solvers beside diffusers' own schedulers."""
