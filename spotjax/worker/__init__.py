"""The worker process: one per instance. It joins a controller, computes its stages and holds slices for others."""
