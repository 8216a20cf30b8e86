"""Manifests for Kubernetes: ``render`` in ``manifests`` makes them of its options. Speaks with no cluster."""
