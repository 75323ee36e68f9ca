"""Video diffusion models, one file per family."""
