"""Distances between sets of images; nothing in here knows a solver."""
