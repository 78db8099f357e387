"""Distances between images and between sets of them. Nothing here knows a solver."""
