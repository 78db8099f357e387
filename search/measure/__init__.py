"""How good a solver is, beside diffusers' own schedulers."""
