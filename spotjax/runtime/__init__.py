"""Everything that runs on devices: compiled stage functions, KV pages, sampling, and the pipelines that drive them."""
