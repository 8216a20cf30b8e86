"""Checkpoints on disk and in buckets: parameters and KV pages, saved with Orbax; and converting models to them."""
