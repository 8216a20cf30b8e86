"""One stay of a worker in a fleet: registers, gets ready, carries out commands until the stream ends."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Iterable
from enum import Enum, auto
from typing import Any

import grpc

from spotjax.errors import ConnectionLost, PeerUnreachable, SpotjaxError, TransportError
from spotjax.protocol import control
from spotjax.transport.join_token import NONCE_BYTES, JoinToken
from spotjax.worker.worker import Worker

log = logging.getLogger(__name__)

Prepare = Callable[[control.Welcome], Awaitable[Worker]]
"""Gets a worker ready to serve what the controller welcomed it to."""


MISTAKES = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNAUTHENTICATED)
"""Ends of a stream that come again until somebody changes something."""

LAST_WORD_SECONDS = 1.0
"""For a controller that turns us away to say why."""


class End(Enum):
    """How a stay ended."""

    LOST = auto()
    """The stream broke; register again."""
    RELEASED = auto()
    """The fleet does without us."""
    TAKEN = auto()
    """The fleet is to see us die."""
    REFUSED = auto()
    """We cannot be part of this fleet."""


class Session:
    """One control stream.

    Args:
      channel: to the controller.
      registration: who we are.
      prepare: called once we are welcome.
      news: what to tell a controller, beside what we have, once we are ready.
      token: of the fleet, that both sides prove to have, if there is one.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        registration: control.Register,
        prepare: Prepare,
        news: Callable[[], Iterable[control.FromWorker]] = tuple,
        token: JoinToken | None = None,
    ) -> None:
        self._registration, self._prepare, self._news, self._token = registration, prepare, news, token
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self._stream: Any = channel.stream_stream(
            control.METHOD,
            request_serializer=control.encode,
            response_deserializer=control.decode_from_controller,
        )(metadata=None if token is None else ((control.NONCE_KEY, self._nonce.hex()),))
        self._worker: Worker | None = None
        self._writing = asyncio.Lock()
        self._carrying_out: asyncio.Task[None] | None = None
        self._beside: set[asyncio.Task[None]] = set()
        self._unfit: asyncio.Future[End] = asyncio.get_running_loop().create_future()

    @property
    def ready(self) -> bool:
        """Whether the worker could be given work."""
        return self._worker is not None

    async def run(self) -> End:
        """Stays until the end. What the worker has then is kept for another controller."""
        following = asyncio.create_task(self._follow())
        try:
            if self._token is not None and not await self._prove(self._token):
                await asyncio.wait({following}, timeout=LAST_WORD_SECONDS)  # it may have said what is wrong
                return following.result() if following.done() else End.LOST
            await self.tell(self._registration)
            await asyncio.wait({following, self._unfit}, return_when=asyncio.FIRST_COMPLETED)
            return self._unfit.result() if self._unfit.done() else following.result()
        except grpc.aio.AioRpcError as problem:
            level = logging.ERROR if problem.code() in MISTAKES else logging.DEBUG
            log.log(level, "the controller ends the stream: %s %s", problem.code().name, problem.details())
            return End.LOST
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            self._stream.cancel()
            for saving in self._beside:
                saving.cancel()
            await asyncio.gather(*self._beside, return_exceptions=True)
            if self._worker is not None:
                self._worker.supersede()
            if self._carrying_out is not None:
                await asyncio.gather(self._carrying_out, return_exceptions=True)
            if self._worker is not None:
                await asyncio.to_thread(self._worker.pause)

    async def _prove(self, token: JoinToken) -> bool:
        """Shows that we have the token; False for a controller that has not."""
        theirs = {key: str(value) for key, value in await self._stream.initial_metadata() or ()}
        nonce, proof = (bytes.fromhex(theirs.get(key, "")) for key in (control.NONCE_KEY, control.PROOF_KEY))
        purpose = control.METHOD.encode()
        try:
            token.require(proof, "called", purpose, self._nonce, nonce)
        except TransportError as problem:
            if proof:
                log.error("the controller does not prove that it has our join token: %s", problem)
            return False
        await self.tell(control.Proof(token.proof("caller", purpose, self._nonce, nonce)))
        return True

    async def tell(self, message: control.FromWorker) -> None:
        """Sends a message; one that the stream does not take any more is lost with the stream."""
        async with self._writing:
            try:
                await self._stream.write(message)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as problem:
                log.debug("not sent any more: %s", problem)

    async def _follow(self) -> End:
        getting_ready: asyncio.Task[None] | None = None
        try:
            async for message in self._stream:
                match message:
                    case control.Welcome():
                        getting_ready = asyncio.create_task(self._get_ready(message))
                    case control.Refused():
                        log.log(logging.INFO if message.retry else logging.ERROR, "refused: %s", message.reason)
                        return End.LOST if message.retry else End.REFUSED
                    case control.Release():
                        return End.TAKEN if message.at_once else End.RELEASED
                    case control.Forget():
                        if self._worker is not None:
                            self._worker.forget(message.sequences)
                    case _:
                        self._begin(message)
            return End.LOST
        finally:
            if getting_ready is not None:
                await asyncio.gather(getting_ready, return_exceptions=True)

    async def _get_ready(self, welcome: control.Welcome) -> None:
        try:
            self._worker = await self._prepare(welcome)
        except ConnectionLost as problem:
            log.warning("cannot get ready: %s", problem)
            self._unfit.set_result(End.LOST)
            return
        except Exception as problem:
            log.error("cannot serve what the fleet serves: %s", problem, exc_info=not isinstance(problem, SpotjaxError))
            self._unfit.set_result(End.REFUSED)
            return
        await self.tell(self._worker.ready())
        # all in line at once: what is heard meanwhile, such as that one of them is taken back, comes after them
        await asyncio.gather(*(self.tell(message) for message in self._news()))

    def _begin(self, command: control.Command) -> None:
        """Starts a command when the one before it is done, which a new preparation puts an end to.

        Parameters do not change: they are saved beside all that is done.
        """
        before, worker = self._carrying_out, self._worker
        if isinstance(command, control.SaveParameters):
            saving = asyncio.create_task(self._carry_out(None, worker, command))
            self._beside.add(saving)
            saving.add_done_callback(self._beside.discard)
            return
        if worker is not None and isinstance(command, control.Prepare | control.Clear):
            worker.supersede()
        if worker is not None and isinstance(command, control.SaveKv):
            worker.expect_save(command.path)
        self._carrying_out = asyncio.create_task(self._carry_out(before, worker, command))

    async def _carry_out(
        self, before: asyncio.Task[None] | None, worker: Worker | None, command: control.Command
    ) -> None:
        if before is not None:
            await asyncio.gather(before, return_exceptions=True)
        if worker is None:
            await self.tell(control.Failed(command.id, "", "not ready yet"))
            return
        try:
            answer: control.FromWorker = await worker.carry_out(command)
        except PeerUnreachable as problem:
            answer = control.Failed(command.id, problem.instance, str(problem))
        except ConnectionLost as problem:
            answer = control.Failed(command.id, "", str(problem))
        except Exception as problem:
            log.exception("command %s failed", type(command).__name__)
            answer = control.Failed(command.id, "", str(problem))
        await self.tell(answer)
