"""A diffusers pipeline's directory: its files, limits, weights, and the backbone made of it."""
