"""Other engines on the same weights, for ``tools.bench_peers``: one module an engine, run by an interpreter of its own.

``run`` is the program. The engines' modules import nothing of Spotjax (but those of Spotjax itself), and each has

- ``prepare(weights, target)``: makes the engine's own format in the directory ``target`` out of the Hugging Face
  directory ``weights``, which also holds ``model-f32.gguf`` and ``model-bf16.gguf``; where there is anything to make;
- ``load(directory, settings)``: gives ``generate(prompts, count, token)``, which continues every prompt greedily by
  ``count`` tokens, end tokens or not, and calls ``token(row, id)`` whenever there is one.
"""
