"""llama.cpp by xllamacpp: its server in this process, asked over HTTP, since that is how it takes several rows."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_servers: list[Any] = []


def load(directory: str, settings: dict[str, Any]) -> Callable[..., None]:
    """See the package."""
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path = f"{directory}/model-{'bf16' if settings['dtype'] == 'bfloat16' else 'f32'}.gguf"
    options.n_ctx, options.n_parallel = settings["context"] * settings["batch"], settings["batch"]
    options.n_batch = options.n_ubatch = settings["batch"] * settings["context"]
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = settings["threads"]
    kinds = xllamacpp.ggml_type
    kind = kinds.GGML_TYPE_BF16 if settings["dtype"] == "bfloat16" else kinds.GGML_TYPE_F32
    options.cache_type_k = options.cache_type_v = kind  # half precision by default
    options.cache_prompt, options.n_gpu_layers, options.verbosity = False, 0, -1
    server = xllamacpp.Server(options)
    _servers.append(server)

    address = server.listening_address.removeprefix("http://")

    def generate(prompts: list[list[int]], count: int, token: Callable[[int, int], None]) -> None:
        def row(number: int) -> None:
            connection = http.client.HTTPConnection(address)
            question = {
                "prompt": prompts[number], "n_predict": count, "temperature": 0.0, "ignore_eos": True, "stream": True,
                "return_tokens": True, "cache_prompt": False,
            }  # fmt: skip
            connection.request("POST", "/completion", json.dumps(question), {"Content-Type": "application/json"})
            for line in connection.getresponse():
                if line.startswith(b"data: "):
                    for one in json.loads(line.removeprefix(b"data: ")).get("tokens", ()):
                        token(number, one)

        with ThreadPoolExecutor(len(prompts)) as pool:
            list(pool.map(row, range(len(prompts))))

    return generate
