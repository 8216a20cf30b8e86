"""The Cloud TPU API over gRPC, in front of ``tpu_cloud``: ``python -m spotjax.testing.tpu_service --port 0``.

Serves version 2 from the messages of the package ``google-cloud-tpu``, with paging, latency and faults: an error before
a call has its effect, or after, when only the answer is lost. Tests tell it what is to happen by one more method, which
takes and gives JSON: ``ADMIN``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fnmatch
import json
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from google.cloud.tpu_v2 import (
    CreateNodeRequest,
    CreateQueuedResourceRequest,
    DeleteNodeRequest,
    DeleteQueuedResourceRequest,
    GetNodeRequest,
    GetQueuedResourceRequest,
    ListNodesRequest,
    ListNodesResponse,
    ListQueuedResourcesRequest,
    ListQueuedResourcesResponse,
    Node,
)
from google.longrunning.operations_pb2 import GetOperationRequest, Operation
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status

from spotjax.testing.tpu_cloud import Refused, TpuCloud
from spotjax.testing.tpu_processes import NodeProcesses

TPU = "/google.cloud.tpu.v2.Tpu/"
OPERATIONS = "/google.longrunning.Operations/"
ADMIN = "/spotjax.testing.Cloud/Do"
TICK = 0.05
HEALTHS = {health.name: health for health in tuple(Node.Health)}

Answer = Callable[[Any], Any]


@dataclass
class Fault:
    """What goes wrong with calls.

    Attributes:
      method: which ones, as a pattern such as ``Create*``.
      code: the error's.
      message: the error's.
      after: the call has its effect, and the answer is the error.
      times: how often; then it is over.
      retry_seconds: what the error says to wait; None if it says nothing.
    """

    method: str
    code: str
    message: str = "injected"
    after: bool = False
    times: int = 1
    retry_seconds: float | None = None


class TpuService(grpc.GenericRpcHandler):
    """Answers calls.

    Args:
      cloud: what they are about.
      page: entries of a page, at most.
      latency: seconds that every call takes.
    """

    def __init__(self, cloud: TpuCloud, page: int = 50, latency: float = 0.0) -> None:
        self.cloud, self.page, self.latency = cloud, page, latency
        self.faults: list[Fault] = []
        self.unreachable: set[str] = set()
        """Zones that lists leave out, and say so."""
        self.on_operation: Callable[[], None] = lambda: None
        """Called before somebody is told of an operation."""
        self.calls: list[str] = []
        """Methods that were called, in order."""
        self._methods = self._tpu_methods()

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        """See ``grpc.GenericRpcHandler``."""
        if details.method == ADMIN:
            return grpc.unary_unary_rpc_method_handler(self._admin, json.loads, _as_json)
        if (known := self._methods.get(details.method)) is None:
            return None
        request_type, answer = known
        return grpc.unary_unary_rpc_method_handler(
            self._guarded(details.method.rpartition("/")[2], answer), request_type, _serialised
        )

    def _tpu_methods(self) -> dict[str, tuple[Callable[[bytes], Any], Answer]]:
        cloud = self.cloud
        methods: Sequence[tuple[str, Any, Answer]] = (
            ("CreateQueuedResource", CreateQueuedResourceRequest, cloud.create_queued_resource),
            (
                "DeleteQueuedResource",
                DeleteQueuedResourceRequest,
                lambda asked: cloud.delete_queued_resource(asked.name, asked.force),
            ),
            ("GetQueuedResource", GetQueuedResourceRequest, lambda asked: cloud.get_queued_resource(asked.name)),
            ("ListQueuedResources", ListQueuedResourcesRequest, self._list_queued_resources),
            ("CreateNode", CreateNodeRequest, cloud.create_node),
            ("DeleteNode", DeleteNodeRequest, lambda asked: cloud.delete_node(asked.name)),
            ("GetNode", GetNodeRequest, lambda asked: cloud.get_node(asked.name)),
            ("ListNodes", ListNodesRequest, self._list_nodes),
        )
        served: dict[str, tuple[Callable[[bytes], Any], Answer]] = {
            TPU + name: (kind.deserialize, answer) for name, kind, answer in methods
        }
        served[OPERATIONS + "GetOperation"] = (
            GetOperationRequest.FromString,
            self._get_operation,
        )
        return served

    def _guarded(self, method: str, answer: Answer) -> Callable[[Any, Any], Awaitable[Any]]:
        async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            self.calls.append(method)
            await asyncio.sleep(self.latency)
            fault = self._fault(method)
            if fault is not None and not fault.after:
                await _abort(context, fault)
            try:
                given = answer(request)
            except Refused as refused:
                await context.abort(refused.code, str(refused))
            if fault is not None:
                await _abort(context, fault)
            return given

        return call

    def _fault(self, method: str) -> Fault | None:
        fault = next((each for each in self.faults if fnmatch.fnmatch(method, each.method)), None)
        if fault is not None:
            fault.times -= 1
            self.faults = [each for each in self.faults if each.times > 0]
        return fault

    def _list_queued_resources(self, asked: ListQueuedResourcesRequest) -> ListQueuedResourcesResponse:
        names, token, away = self._page(asked, self.cloud.within(asked.parent, self.cloud.requests))
        shown = [self.cloud.requests[name] for name in names]
        return ListQueuedResourcesResponse(queued_resources=shown, next_page_token=token, unreachable=away)

    def _list_nodes(self, asked: ListNodesRequest) -> ListNodesResponse:
        names, token, away = self._page(asked, self.cloud.within(asked.parent, self.cloud.nodes))
        shown = [self.cloud.nodes[name] for name in names]
        return ListNodesResponse(nodes=shown, next_page_token=token, unreachable=away)

    def _get_operation(self, asked: GetOperationRequest) -> Operation:
        self.on_operation()
        return self.cloud.get_operation(asked.name)

    def _page(self, asked: Any, names: list[str]) -> tuple[list[str], str, list[str]]:
        """Names of the page, the token of the next one (the last name of this), and what is out of reach."""
        if asked.parent.rpartition("/")[2] in self.unreachable:
            return [], "", [asked.parent]
        rest = [name for name in names if name > asked.page_token]
        size = min(asked.page_size or self.page, self.page)
        return rest[:size], rest[size - 1] if len(rest) > size else "", []

    async def _admin(self, order: dict[str, Any], context: grpc.aio.ServicerContext[Any, Any]) -> dict[str, Any]:
        """Orders of a test: ``{"do": "preempt", "node": NAME}`` and so on. Answers with all states."""
        kind = order.pop("do")
        try:
            if kind == "preempt":
                self.cloud.preempt(order["node"])
            elif kind == "health":
                node = self.cloud.get_node(order["node"])
                node.health, node.health_description = HEALTHS[order["health"]], order.get("why", "")
            elif kind == "fault":
                self.faults.append(Fault(**order))
            elif kind == "capacity":
                self.cloud.capacity[order["zone"], order["type"]] = order["count"]
            elif kind != "show":
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"cannot {kind}")
        except Refused as refused:
            await context.abort(refused.code, str(refused))
        return {
            "requests": {name: each.state.state.name for name, each in self.cloud.requests.items()},
            "nodes": {name: each.state.name for name, each in self.cloud.nodes.items()},
        }


async def start(service: TpuService, port: int = 0) -> tuple[grpc.aio.Server, str]:
    """A server on this machine, and its HOST:PORT."""
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((service,))
    address = f"127.0.0.1:{server.add_insecure_port(f'127.0.0.1:{port}')}"
    await server.start()
    return server, address


async def order(channel: grpc.aio.Channel, **what: Any) -> dict[str, Any]:
    """Sends a service of another process an order; see ``_admin``."""
    call: grpc.aio.UnaryUnaryMultiCallable[Any, Any] = channel.unary_unary(ADMIN, _as_json, json.loads)
    answer: dict[str, Any] = await call(what)
    return answer


async def _abort(context: grpc.aio.ServicerContext[Any, Any], fault: Fault) -> None:
    code, metadata = grpc.StatusCode[fault.code], []
    if fault.retry_seconds is not None:
        status = Status(code=code.value[0], message=fault.message)
        wait = Duration()
        wait.FromMilliseconds(round(fault.retry_seconds * 1000))
        status.details.add().Pack(RetryInfo(retry_delay=wait))
        metadata.append(("grpc-status-details-bin", status.SerializeToString()))
    await context.abort(code, fault.message, tuple(metadata))


def _as_json(what: Any) -> bytes:
    return json.dumps(what).encode()


def _serialised(message: Any) -> bytes:
    if isinstance(message, Message):
        return message.SerializeToString()
    serialised: bytes = type(message).serialize(message)
    return serialised


async def serve(arguments: argparse.Namespace) -> None:
    """Serves until the process is ended."""
    capacity = {}
    for each in arguments.capacity:
        zone, kind, count = each.split(":")
        capacity[zone, kind] = int(count)
    cloud = TpuCloud(capacity, time.time, arguments.step)
    server, address = await start(TpuService(cloud, arguments.page, arguments.latency), arguments.port)
    print(address, flush=True)
    processes = NodeProcesses(arguments.on_ready)
    me = asyncio.current_task()
    assert me is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, me.cancel)
    try:
        while True:
            await asyncio.sleep(TICK)
            cloud.advance()
            await processes.follow(cloud)
    finally:
        await processes.close()
        await server.stop(0)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description="a stand-in for the Cloud TPU API")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--capacity", nargs="+", default=["us-west4-a:v5litepod-8:8"], metavar="ZONE:TYPE:COUNT")
    parser.add_argument("--step", type=float, default=0.05, help="seconds from one state to the next")
    parser.add_argument("--page", type=int, default=50, help="entries of a page")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds that a call takes")
    parser.add_argument("--on-ready", default="", help="shell command that is the host of a node; ends with the node")
    with contextlib.suppress(KeyboardInterrupt, asyncio.CancelledError):
        asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
