"""Any diffusers pipeline as a function of a solver."""
