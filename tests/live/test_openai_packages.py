"""OpenAI's own packages, for Python and for Node, against a real server: what they get is what gRPC gets."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from live_cases import CONTROLLER
from openai_suite import MESSAGES, suite

from spotjax.async_client import AsyncSpotjaxClient
from spotjax.tools.processes import free_port
from spotjax.tools.service import Service, running

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

NODE = Path(__file__).with_name("openai_node")
FLAGS = (*CONTROLLER, "--instances", "2", "--devices-per-instance", "2", "--mesh", "1x2x2", "--queue-limit", "8")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(programs: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    """The shipped model in one process, with room for few requests at once."""
    flags = (*FLAGS, "--compilation-cache", str(programs))
    http = f"127.0.0.1:{free_port('127.0.0.1')}"
    directory = tmp_path_factory.mktemp("openai")
    async with running(Service(directory, flags, ["instance-0", "instance-1"], http=http)) as service:
        yield service


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def expected(server: Service) -> dict[str, Any]:
    """What gRPC says to the same."""

    async def texts(prompt: Any, max_tokens: int, n: int = 1, **fields: Any) -> tuple[list[str], list[Any], int]:
        told, entries, used = [""] * n, [], 0
        async for delta in client.generate(prompt, max_tokens=max_tokens, n=n, temperature=0.8, seed=11, **fields):
            told[delta.choice] += delta.text
            entries += delta.logprobs
            used += delta.usage.prompt_tokens + delta.usage.completion_tokens if delta.usage is not None else 0
        return told, entries, used

    async with AsyncSpotjaxClient(server.address) as client:
        (chat,), _, used = await texts(MESSAGES, 24)
        (stopped,), _, _ = await texts(MESSAGES, 24, stop=["e"])
        _, logprobs, _ = await texts(MESSAGES, 4, logprobs=2)
        return {
            "models": ["tiny", "tiny"],
            "chat": [chat, "length", used],
            "stream": [chat, used],
            "completion": [(await texts(prompt, 12))[0][0] for prompt in ("ROMEO:\n", "JULIET:\n")],
            "n": (await texts(MESSAGES, 8, n=3))[0],
            "stop": [stopped, "stop"],
            "logprobs": [[round(entry.token, 4), len(entry.top)] for entry in logprobs],
            "refused": ["RateLimitError", "none"],
            "patient": 1,
        }


def check(told: dict[str, Any], expected: dict[str, Any], timeout: str) -> None:
    """Compares what a package got; bytes of tokens are those of the text."""
    assert told.pop("errors") == ["BadRequestError", "BadRequestError", "NotFoundError", timeout]
    read = b"".join(bytes(entry[0]) for entry in told["logprobs"]).decode()
    assert expected["chat"][0].startswith(read) and read
    told["logprobs"] = [entry[1:] for entry in told["logprobs"]]
    assert told == expected


async def test_the_package_for_python_gets_what_grpc_gets(server: Service, expected: dict[str, Any]) -> None:
    check(await suite(f"http://{server.http}/v1"), expected, "APITimeoutError")


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no node here")
@pytest.mark.skipif(
    not (NODE / "node_modules/openai").is_dir(),
    reason="openai is not installed: npm ci --prefix tests/live/openai_node",
)
async def test_the_package_for_node_gets_what_grpc_gets(server: Service, expected: dict[str, Any]) -> None:
    process = await asyncio.create_subprocess_exec(
        "node", str(NODE / "suite.mjs"), f"http://{server.http}/v1",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, problems = await process.communicate()
    assert process.returncode == 0, problems.decode()
    check(json.loads(out), expected, "APIConnectionTimeoutError")
