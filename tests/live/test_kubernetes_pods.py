"""Processes started and ended as the kubelet would: commands, settings, variables and probes of the manifests.

In place of volumes there are directories, in place of Services and addresses of pods 127.0.0.1 with free ports.
"""

from __future__ import annotations

import asyncio
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kubernetes_cases import IMAGE, Manifest, applied, container_of, of_kind, pods
from live_cases import SHAPES

from spotjax import cli
from spotjax.async_client import AsyncSpotjaxClient
from spotjax.bootstrap.kubernetes.options import KubernetesOptions
from spotjax.tools.processes import Process, free_port
from spotjax.tools.service import POLL_SECONDS, ready

pytestmark = pytest.mark.timeout(300)
START_SECONDS = 240.0
OPTIONS = KubernetesOptions(
    cluster="local", image=IMAGE, devices=2, notice_seconds=12.0, drain_seconds=20.0,
    settings={**SHAPES, "fuse": False, "instance_memory_bytes": 1 << 30},
)  # fmt: skip


class Pod:
    """One pod of a template, on this machine."""

    def __init__(self, name: str, template: Manifest, directory: Path, environment: dict[str, str]) -> None:
        self.name, self._container, self._directory = name, container_of(template), directory
        self.grace: int = template["spec"]["terminationGracePeriodSeconds"]
        fixed = {variable["name"]: variable.get("value", "") for variable in self._container["env"]}
        home = {"SPOTJAX_NAME": name, "SPOTJAX_CACHE": str(directory / name), "HOME": str(directory / name)}
        if "SPOTJAX_NAME" not in fixed:
            del home["SPOTJAX_NAME"]
        self._environment = {**fixed, **home, **environment}
        self.process = Process(name, self._words(self._container["command"]), directory, self._environment)

    def _words(self, command: list[str]) -> list[str]:
        assert command[0] == "spotjax"
        return [sys.executable, "-m", *(word.replace("/etc/spotjax/", f"{self._directory}/") for word in command)]

    async def probe(self, kind: str) -> bool:
        """What the pod's probe by command says."""
        words = self._words(self._container[kind]["exec"]["command"])
        environment = " ".join(shlex.quote(f"{name}={value}") for name, value in self._environment.items())
        inherited = 'env -i PATH="$PATH" JAX_PLATFORMS=cpu'
        run = ["sh", "-c", f"{inherited} {environment} {shlex.join(words)}"]
        return (await asyncio.to_thread(subprocess.run, run, capture_output=True)).returncode == 0

    async def delete(self) -> tuple[int, float]:
        """SIGTERM; exit code and seconds, which are fewer than those after which it would be killed."""
        started = time.monotonic()
        self.process.signal(signal.SIGTERM, whole=False)
        code = await asyncio.to_thread(self.process.wait, self.grace)
        return code, time.monotonic() - started


async def test_workers_leave_within_their_time_and_the_controller_drains(
    programs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifests = applied(OPTIONS)
    for name, text in of_kind(manifests, "ConfigMap")[0]["data"].items():
        (tmp_path / name).write_text(text)
    templates = {manifest["metadata"]["name"]: template for manifest, template in pods(manifests)}
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    token, keys = tmp_path / "join-token", tmp_path / "keys.toml"
    assert cli.main(["keys", "join-token", str(token)]) == 0
    assert cli.main(["keys", "add", "admin", str(keys), "--role", "admin"]) == 0
    key = capsys.readouterr().out.strip()
    data = {"SPOTJAX_DATA_LISTEN": "127.0.0.1:0", "SPOTJAX_JOIN_TOKEN": str(token)}
    controller = Pod(
        "controller", templates["spotjax-controller"], tmp_path,
        {"SPOTJAX_LISTEN": address, "SPOTJAX_COMMIT_LOG": str(tmp_path / "log"), "SPOTJAX_API_KEYS": str(keys), **data},
    )  # fmt: skip
    place = {"SPOTJAX_JOIN": address, "SPOTJAX_ADVERTISE": "127.0.0.1", "SPOTJAX_COMPILATION_CACHE": str(programs)}
    place |= {"SPOTJAX_PARAMETER_STORE": str(tmp_path / "shm")}
    workers = [Pod(f"worker-{n}", templates["spotjax-worker"], tmp_path, {**place, **data}) for n in "ab"]
    try:
        deadline = time.monotonic() + START_SECONDS
        while " is serving " not in controller.process.output():
            assert time.monotonic() < deadline and controller.process.exit_code is None, controller.process.tail()
            await asyncio.sleep(POLL_SECONDS)
        async with AsyncSpotjaxClient(address, api_key=key) as client:
            while len(ready(before := await client.status())) < len(workers):
                assert time.monotonic() < deadline, before
                await asyncio.sleep(POLL_SECONDS)
            assert await client.ready()
            assert all([await worker.probe("readinessProbe") for worker in workers])
            holding = {instance.name for instance in before.instances if instance.positions}
            workers.sort(key=lambda worker: worker.name not in holding)
            undisturbed = [
                token async for d in client.generate("x", max_tokens=220, temperature=0) for token in d.tokens
            ]
            tokens: list[int] = []
            ends: list[asyncio.Task[tuple[int, float]]] = []
            async for delta in client.generate("x", max_tokens=220, temperature=0):
                tokens += delta.tokens
                if len(tokens) >= 40 and not ends:
                    ends.append(asyncio.create_task(workers[0].delete()))
            assert tokens == undisturbed
            code, seconds = await ends[0]
            print(f"the worker ended after {seconds:.2f} s of {workers[0].grace}")
            assert code == 0, workers[0].process.tail()
            assert not await workers[0].probe("readinessProbe")
            assert await workers[1].probe("readinessProbe")
            assert (await client.status()).reconfigurations > before.reconfigurations

            tokens = []
            async for delta in client.generate("x", max_tokens=220, temperature=0):
                tokens += delta.tokens
                if len(tokens) >= 40 and len(ends) == 1:
                    ends.append(asyncio.create_task(controller.delete()))
            assert tokens == undisturbed
            code, seconds = await ends[1]
            print(f"the controller ended after {seconds:.2f} s of {controller.grace}")
            assert code == 0, controller.process.tail()
        assert not await workers[1].probe("readinessProbe"), "nobody has it in a fleet"
        assert (await workers[1].delete())[0] == 0, "it waits for a controller"
    finally:
        for pod in (controller, *workers):
            pod.process.kill()
