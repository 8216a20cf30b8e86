"""Tries a start-up script of ``spotjax bootstrap gce`` on a bare machine: ``python -m spotjax.tools.try_bootstrap``.

Builds a wheel of Spotjax, starts a controller and a stand-in of the metadata server, and boots a directory that has
nothing of Spotjax (``tools.bare_machine``) with the script. It must join and serve a request, be left alone when the
script runs again, and leave when it is told to end; without a controller it must be about to shut down. Needs Linux
and root.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec

import spotjax.models
from spotjax.api.access.key_file import TOKEN_MARK, new_secret, write_private
from spotjax.bootstrap.options import BootstrapOptions
from spotjax.bootstrap.script import script
from spotjax.client import SpotjaxClient
from spotjax.errors import SpotjaxError
from spotjax.tools.bare_machine import BareMachine, MachineUnavailable
from spotjax.tools.processes import Process, free_port

ROOT = Path(spotjax.models.__file__).resolve().parents[1]
SECONDS = 240.0
ALONE_SECONDS = 8.0
TIMED_OUT = 124
"""Exit code of ``timeout``."""
NAME = "spot-a"
FEW_SHAPES = ("--max-batch", "2", "--prefill-tokens", "16", "--max-model-len", "64", "--no-fuse")
"""Flags of the controller, so that little is compiled."""
VALUES = {
    "instance/network-interfaces/0/ip": "127.0.0.1",
    "instance/attributes/spotjax-name": NAME,
    "instance/scheduling/preemptible": "TRUE",
}


@dataclass(frozen=True)
class Trial:
    """What came of it.

    Attributes:
      joined: seconds from the boot to the word that it has joined, with installation.
      again: seconds that the script took the second time.
      text: that was generated.
      said: what the script asked of the init system.
      alone: the same, when there was no controller to join.
      log: what the script said.
    """

    joined: float
    again: float
    text: str
    said: list[str]
    alone: list[str]
    log: str


def build_wheel(directory: Path) -> Path:
    """A wheel of this checkout.

    Raises:
      subprocess.CalledProcessError: it cannot be built.
    """
    source = directory / "source"
    for name in ("spotjax", "models", "meshes", "tools"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = ("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    subprocess.run([sys.executable, *pip, "-w", directory, source], check=True, capture_output=True)
    (wheel,) = directory.glob("*.whl")
    return wheel


def attempt(directory: Path, programs: Path, patient: float = SECONDS) -> Trial:
    """Does all of it.

    Args:
      directory: for files and logs.
      programs: of compiled programs, so that the worker need not compile again what others have.
      patient: seconds that each step may take.

    Raises:
      MachineUnavailable: no bare machine can be made here.
      AssertionError: something did not happen; says what.
    """
    programs.mkdir(exist_ok=True, parents=True)
    programs.chmod(0o777)  # for the worker, which is another user
    machine = BareMachine(directory, programs)
    wheel = build_wheel(directory)
    (machine.root / "srv").mkdir()
    token = machine.root / "srv/join-token"
    write_private(token, new_secret(TOKEN_MARK), replace=False)
    shutil.copy(wheel, machine.root / "srv")
    # with the memory that virtual devices have by default, one machine is too few for the model
    settings: dict[str, str | int | float | bool] = {
        "devices_per_instance": 2, "instance_memory_bytes": 1 << 30, "compilation_cache": "/shared",
    }  # fmt: skip
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    options = BootstrapOptions(
        join=address, accelerator="cpu", wheel=f"/srv/{wheel.name}", python=str(machine.python), system_packages=True,
        find_links="/srv", join_token="/srv/join-token", data_port=free_port("127.0.0.1"), grace_seconds=1.0,
        settings=settings,
    )  # fmt: skip
    (machine.root / "boot.sh").write_text(script("gce", options))
    command = (
        "serve",
        "--listen",
        address,
        "--http",
        "off",
        "--durability",
        "none",
        *FEW_SHAPES,
        "--join-token",
        str(token),
    )
    controller = Process("controller", (sys.executable, "-m", "spotjax", *command), directory)
    try:
        with _metadata() as metadata, machine:
            boot = f"GCE_METADATA_HOST={shlex.quote(metadata)} timeout {patient:g} bash /boot.sh"
            started = time.monotonic()
            assert machine.run(boot) == 0, f"{machine.log('boot')}\n{machine.log('worker')}\n{controller.tail()}"
            joined = time.monotonic() - started
            with SpotjaxClient(address, SECONDS) as client:
                text = "".join(delta.text for delta in client.generate("Once upon a time", max_tokens=8, temperature=0))
            first = (machine.root / "run/worker.pid").read_text().strip()
            started = time.monotonic()
            assert machine.run(boot) == 0, machine.log("boot")
            again = time.monotonic() - started
            assert (machine.root / "run/worker.pid").read_text().strip() == first, "it was started anew for nothing"
            assert machine.run(f"kill {first}") == 0
            _until(lambda: "the worker has ended in order" in machine.said, patient, lambda: machine.log("worker"))
            said = machine.said
            nowhere = msgspec.structs.replace(options, join=f"127.0.0.1:{free_port('127.0.0.1')}")
            (machine.root / "boot.sh").write_text(script("gce", nowhere))
            code = machine.run(f"GCE_METADATA_HOST={shlex.quote(metadata)} timeout {ALONE_SECONDS:g} bash /boot.sh")
            assert code == TIMED_OUT, f"it ended with {code} though nobody is there to join"
            return Trial(joined, again, text, said, machine.said[len(said) :], machine.log("boot"))
    finally:
        controller.kill()


@contextmanager
def _metadata() -> Iterator[str]:
    """HOST:PORT of a metadata server."""
    command = (sys.executable, "-m", "spotjax.testing.metadata_gce", "--port=0")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            address = server.stdout.readline().strip()
            for key, value in VALUES.items():
                httpx.post(f"{address}/admin/orders/tell", json={"key": key, "value": value}).raise_for_status()
            yield address.removeprefix("http://")
        finally:
            server.terminate()


def _until(condition: Callable[[], bool], seconds: float, story: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, story()
        time.sleep(0.05)


def main() -> int:
    """Prints what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", metavar="DIRECTORY", type=Path, help="of compiled programs; kept")
    programs = parser.parse_args().programs
    with tempfile.TemporaryDirectory(prefix="bootstrap-") as directory:
        try:
            trial = attempt(Path(directory), programs or Path(directory) / "programs")
        except (MachineUnavailable, AssertionError, SpotjaxError) as problem:
            print(f"try_bootstrap: {problem}", file=sys.stderr)
            return 1
    print(trial.log)
    print("\n".join(trial.said))
    print(f"joined after {trial.joined:.1f} s, run again in {trial.again:.1f} s; generated {trial.text!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
