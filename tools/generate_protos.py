"""Generates the Python stubs of ``spotjax.v1`` next to the protos, or says whether the checked-in ones are current.

    python -m spotjax.tools.generate_protos            writes them
    python -m spotjax.tools.generate_protos --check    exits with 1 and names those that differ

Needs the pinned ``grpcio-tools`` of the ``protos`` extra; another version gives other stubs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
PROTOS = Path("spotjax/api/proto/spotjax/v1")
"""Below the root, so that the stubs import each other as ``spotjax.api.proto.spotjax.v1``."""


def generate(target: Path) -> list[Path]:
    """Writes all stubs below ``target``. Returns their paths relative to it.

    Raises:
      RuntimeError: protoc refused a proto; its complaint is on standard error.
    """
    import grpc_tools
    from grpc_tools import protoc

    well_known = Path(grpc_tools.__file__).parent / "_proto"
    protos = sorted(path.relative_to(ROOT) for path in (ROOT / PROTOS).glob("*.proto"))
    outputs = [f"--{kind}_out={target}" for kind in ("python", "pyi", "grpc_python")]
    if protoc.main(["protoc", f"-I{ROOT}", f"-I{well_known}", *outputs, *map(str, protos)]) != 0:
        raise RuntimeError("protoc failed")
    return sorted(path.relative_to(target) for path in (target / PROTOS).glob("*_pb2*.py*"))


def outdated() -> list[Path]:
    """Stubs, relative to the root, that are missing, changed or left over."""
    with TemporaryDirectory() as directory:
        fresh = {path: (Path(directory) / path).read_bytes() for path in generate(Path(directory))}
    present = {path.relative_to(ROOT): path.read_bytes() for path in (ROOT / PROTOS).glob("*_pb2*.py*")}
    return sorted(path for path in fresh.keys() | present.keys() if fresh.get(path) != present.get(path))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a checked-in stub is not current")
    arguments = parser.parse_args(argv)
    if not arguments.check:
        generate(ROOT)
        return 0
    for path in (stale := outdated()):
        print(f"{path} is not current: run python -m spotjax.tools.generate_protos", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
