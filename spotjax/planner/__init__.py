"""Decides which mesh to run, on which devices, and what has to move. Pure functions of data: no jax, no clock."""
