"""How a solver is found."""
