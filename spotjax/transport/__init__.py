"""Frames and bulk reads between processes over TCP. Knows nothing of models, steps or plans; imports no jax."""
