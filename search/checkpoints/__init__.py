"""Official checkpoints as diffusers pipelines."""
