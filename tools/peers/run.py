"""Runs one engine of ``tools.peers`` in this interpreter: reads a job as JSON, writes what was measured as JSON.

Started as a file, not as a module: the interpreter that an engine is installed in has no Spotjax.
"""

from __future__ import annotations

import gc
import importlib
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """``run.py ENGINE JOB RESULT``; the job says ``directory``, ``settings``, ``prompts``, ``count``, ``repeats``."""
    engine, job_file, result_file = sys.argv[1:]
    job = json.loads(Path(job_file).read_text())
    sys.path.append(str(Path(__file__).parent))  # it may not be there: PYTHONSAFEPATH
    peer = importlib.import_module(f"peer_{engine}")
    if job["prepare"]:
        if hasattr(peer, "prepare"):
            peer.prepare(job["weights"], job["directory"])
        return
    generate = peer.load(job["directory"], job["settings"])
    measure(generate, job["prompts"], min(8, job["count"]))  # whatever is made on the first call
    runs = [measure(generate, job["prompts"], job["count"]) for _ in range(job["repeats"])]
    if hasattr(peer, "close"):
        peer.close()  # first: of children, the memory of those that ended is known
    Path(result_file).write_text(json.dumps({"runs": runs, "peak_bytes": peak_bytes()}))


def measure(generate: Any, prompts: list[list[int]], count: int) -> dict[str, Any]:
    """One run: seconds from the start at which every row's tokens were there, and the tokens.

    A row may have fewer than asked for: some engines end at one of a model's end tokens whatever they are told.
    """
    times: list[list[float]] = [[] for _ in prompts]
    tokens: list[list[int]] = [[] for _ in prompts]
    gc.collect()
    begin = time.perf_counter()

    def token(row: int, number: int) -> None:
        times[row].append(time.perf_counter() - begin)
        tokens[row].append(number)

    generate(prompts, count, token)
    if any(not 1 < len(row) <= count for row in tokens):
        raise SystemExit(f"asked for {count} tokens of every row, got {[len(row) for row in tokens]}")
    return {"times": times, "tokens": tokens}


def peak_bytes() -> int:
    """Most memory that this process and the largest of its children had."""
    own, children = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return (own + children) * 1024


if __name__ == "__main__":
    main()
