"""``spotjax bench`` against our server, over HTTP and gRPC, and against rivals, on the same weights and processors.

One server runs at a time, and every one is asked the same prompts at the same moments: first some that do not count,
then requests in fixed steps, a Poisson process, and a closed loop of as many clients as ``--concurrency``:

    python -m spotjax.tools.bench_peers --install --environments ~/peers
    python -m spotjax.tools.bench_rivals --environments ~/peers --output rivals.json

The model's files are made beside the environments where they are missing. Servers take turns, ``--rounds`` times all of
them. With ``--clients spotjax vllm``, ``vllm bench serve`` measures each HTTP server, too, with the same lengths and
steps (its prompts are its own): an independent look at the same figures. Prefix caches are off in all servers, as
prompts are asked more than once. Prints tables; the JSON has load averages, too.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from spotjax.bench.machine import load_average, machine, versions
from spotjax.tools import rival_servers
from spotjax.tools.peer_models import write_model
from spotjax.tools.rival_servers import available, serving

VLLM_CLIENT = "import argparse; from vllm.benchmarks import serve; p = argparse.ArgumentParser(); " \
    "serve.add_cli_args(p); serve.main(p.parse_args())"  # fmt: skip
SHOWN = {
    "output_throughput": "tokens/s", "median_ttft_ms": "TTFT ms", "p99_ttft_ms": "p99", "median_tpot_ms": "TPOT ms",
    "p99_tpot_ms": "p99", "median_itl_ms": "ITL ms", "p99_itl_ms": "p99", "median_e2el_ms": "E2EL ms",
    "failed": "failed",
}  # fmt: skip
console = Console()


def loads(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """Flags of each load, by its name."""
    open_loop = ["--rate", str(arguments.rate), "--requests", str(arguments.requests)]
    return {
        f"fixed {arguments.rate:g}/s": ["--arrivals", "fixed", *open_loop],
        f"poisson {arguments.rate:g}/s": ["--arrivals", "poisson", *open_loop],
        f"{arguments.concurrency} clients": [
            "--requests", str(arguments.requests), "--concurrency", str(arguments.concurrency),
        ],
    }  # fmt: skip


def spotjax_bench(target: Sequence[str], flags: Sequence[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Figures of one run.

    Raises:
      RuntimeError: it has none.
    """
    lengths = ["--prompt-tokens", str(arguments.prompt), "--output-tokens", str(arguments.new), "--ignore-eos"]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "run.json")
        done = subprocess.run(
            [sys.executable, "-m", "spotjax", "bench", *target, *flags, *lengths, "--seed", str(arguments.seed),
             "--warm-up", "0", "--json", str(path), "--json-requests"],
            capture_output=True, text=True,
        )  # fmt: skip
        if not path.exists():
            raise RuntimeError(f"spotjax bench: {done.stderr[-1500:]}")
        found: dict[str, Any] = json.loads(path.read_text())["runs"][0]
    return found


def vllm_bench(url: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Figures of ``vllm bench serve`` for the load in fixed steps.

    Raises:
      RuntimeError: it has none.
    """
    model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
    with tempfile.TemporaryDirectory() as directory:
        flags = {
            "--base-url": url, "--model": model, "--tokenizer": arguments.weights, "--dataset-name": "random",
            "--input-len": arguments.prompt, "--output-len": arguments.new, "--num-prompts": arguments.requests,
            "--request-rate": arguments.rate, "--burstiness": "inf", "--seed": arguments.seed, "--temperature": 0,
            "--percentile-metrics": "ttft,tpot,itl,e2el", "--metric-percentiles": "50,90,99",
            "--result-dir": directory, "--result-filename": "run.json",
        }  # fmt: skip
        words = [str(word) for flag in flags.items() for word in flag]
        done = subprocess.run(
            [arguments.environments / "vllm" / "bin" / "python", "-c", VLLM_CLIENT, *words, "--ignore-eos",
             "--save-result", "--disable-tqdm"],
            capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        )  # fmt: skip
        path = Path(directory, "run.json")
        if not path.exists():
            raise RuntimeError(f"vllm bench serve: {done.stderr[-1500:]}")
        found: dict[str, Any] = json.loads(path.read_text())
    return found


def measure(name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All loads on one server, which runs meanwhile."""
    rows: list[dict[str, Any]] = []

    def note(server: str, client: str, load: str, figures: Mapping[str, Any]) -> None:
        rows.append({"server": server, "client": client, "load": load, "load_average": load_average(), **figures})
        console.print(f"{server}, {load}, by {client}: {figures['output_throughput']:.3g} tokens/s")

    with tempfile.TemporaryDirectory() as directory:
        places = rival_servers.places(arguments.environments, arguments.weights, Path(directory), arguments.threads)
        with serving(name, places) as url:
            targets = {name: ["--server", url]}
            if name == "spotjax":
                grpc = ["--api", "grpc", "--server", f"{rival_servers.HOST}:{places.grpc_port}"]
                targets = {"spotjax HTTP": targets[name], "spotjax gRPC": grpc}
            for server, target in targets.items():
                clients = str(arguments.concurrency)
                spotjax_bench(
                    target, ["--requests", str(3 * arguments.concurrency), "--concurrency", clients], arguments
                )
                for load, flags in loads(arguments).items():
                    note(server, "spotjax", load, spotjax_bench(target, flags, arguments))
            if "vllm" in arguments.clients:
                note(next(iter(targets)), "vllm", next(iter(loads(arguments))), vllm_bench(url, arguments))
    return rows


def equal_answers(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Share of requests that each server answered as the first one did, over the runs of our client."""
    answers: dict[str, dict[tuple[str, int], str]] = {}
    for row in rows:
        for number, request in enumerate(row.get("requests", ())):
            answers.setdefault(row["server"], {})[row["load"], number] = request["answer"]
    first = next(iter(answers.values()))
    return {
        name: sum(digest == first[which] for which, digest in found.items()) / len(found)
        for name, found in answers.items()
    }


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """A table for each load; of several rounds the median of each figure."""
    for load in dict.fromkeys(row["load"] for row in rows):
        table = Table(title=load, title_justify="left")
        table.add_column("server", no_wrap=True)
        table.add_column("measured by")
        for heading in SHOWN.values():
            table.add_column(heading, justify="right")
        for server, client in dict.fromkeys((row["server"], row["client"]) for row in rows if row["load"] == load):
            runs = [r for r in rows if (r["server"], r["client"], r["load"]) == (server, client, load)]
            table.add_row(server, client, *(f"{statistics.median(run[name] for run in runs):.4g}" for name in SHOWN))
        console.print(table)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, required=True, metavar="DIRECTORY", help="of the rivals")
    parser.add_argument("--models", type=Path, metavar="DIRECTORY", help="for the weights; default: beside those")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--servers", nargs="+", choices=[*rival_servers.COMMANDS], default=[*rival_servers.COMMANDS])
    parser.add_argument("--clients", nargs="+", choices=["spotjax", "vllm"], default=["spotjax"], help="who measures;"
        " vllm is its bench serve, which looks at the fixed steps over HTTP only")  # fmt: skip
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--rate", type=float, default=1.0, help="requests per second of open loops")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--concurrency", type=int, default=8, help="clients of the closed loop")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    arguments.environments = arguments.environments.expanduser().absolute()
    models = (arguments.models or arguments.environments / "models").expanduser().absolute()
    arguments.weights = models / arguments.model / "huggingface"
    if not (arguments.weights / "model-f32.gguf").exists():
        write_model(arguments.model, arguments.weights, arguments.seed)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers are ended, too
    rows: list[dict[str, Any]] = []
    for name in [*arguments.servers] * arguments.rounds:
        if not available(name, arguments.environments):
            console.print(f"[yellow]{name} is not installed and left out[/]")
            continue
        rows += measure(name, arguments)
        if arguments.output:  # after each server: the rest may fail
            told = {"machine": machine(), "versions": versions(), "arguments": vars(arguments)}
            arguments.output.write_text(json.dumps({**told, "rows": rows}, indent=1, default=str) + "\n")
    show(rows)
    console.print("answers as those of the first server:", equal_answers(rows))


if __name__ == "__main__":
    main()
