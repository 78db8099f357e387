"""Search solvers for diffusers pipelines: `accelerate launch -m dssolver_search search ...`."""
