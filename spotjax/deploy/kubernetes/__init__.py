"""Manifests for Kubernetes: ``render`` in ``manifests`` makes them from ``Values``. Speaks with no cluster."""
