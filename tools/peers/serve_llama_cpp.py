"""llama.cpp's server by xllamacpp, until it is ended: ``serve_llama_cpp.py GGUF PORT SLOTS CONTEXT THREADS``.

Started as a file, in the interpreter that xllamacpp is installed in.
"""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """Command line."""
    import xllamacpp

    path, port, slots, context, threads = sys.argv[1], *map(int, sys.argv[2:])
    options = xllamacpp.CommonParams()
    options.model.path, options.port, options.verbosity = path, port, -1
    options.n_ctx, options.n_parallel, options.n_gpu_layers = context * slots, slots, 0
    options.cache_prompt = False
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(options)
    print(f"serving at {server.listening_address}", flush=True)
    signal.sigwait([signal.SIGTERM, signal.SIGINT])


if __name__ == "__main__":
    main()
