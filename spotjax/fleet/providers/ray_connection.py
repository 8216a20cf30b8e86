"""A process that is connected to a Ray cluster for a controller: ``python -m spotjax.fleet.providers.ray_connection``.

Ray ends a process that loses its cluster for good, and a controller must not end so. Reads requests as lines of JSON
from standard input, one at a time, and writes an answer to each; ends with its input.

Without its dashboard Ray tells of actors and drains through internal modules only; they are used here and in
``ray_machine``, and nowhere else.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, Literal, TextIO

import msgspec

from spotjax.errors import ProviderError, ProviderRefused, ProviderUnavailable
from spotjax.fleet.providers.ray_machine import RayMachine
from spotjax.fleet.providers.ray_records import STORE, Found, Wish, fact_key, fits, is_over, key_of

SECONDS = 10.0
"""For the cluster to answer."""


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """A request. What ``program`` and ``patience`` are says ``RayMachine``."""

    verb: Literal["list", "request", "release"]
    name: str = ""
    wish: Wish | None = None
    program: tuple[str, ...] = ()
    patience: float = 0.0


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it: the machines, or an error of ours by its class's name."""

    found: tuple[Found, ...] = ()
    error: str = ""
    message: str = ""


class Connection:
    """One fleet's view of a cluster. All calls block."""

    def __init__(self, address: str, fleet: str) -> None:
        """Connects.

        Raises:
          ProviderUnavailable: there is no cluster there, or it does not answer.
          ProviderRefused: it is of another version of Ray or Python.
        """
        ray: Any = importlib.import_module("ray")
        self._ray, self._fleet, self._namespace = ray, fleet, f"spotjax-{fleet}"
        try:
            ray.init(address, namespace=self._namespace, log_to_driver=False, logging_level="error")
        except (OSError, RuntimeError, ValueError) as problem:
            error = ProviderRefused if "ersion mismatch" in str(problem) else ProviderUnavailable
            raise error(f"Ray at {address}: {problem}") from problem
        self._store: Any = importlib.import_module("ray._private.worker").global_worker.gcs_client

    def list(self) -> tuple[Found, ...]:
        """Every machine of the fleet; what was given back and is gone is forgotten."""
        nodes = [node for node in self._ray.nodes() if node["Alive"]]
        draining = self._store.get_draining_nodes(timeout=SECONDS)
        found = []
        for wish in self._wishes():
            machine = self._find(wish, nodes, draining)
            if machine.released and is_over(machine):
                self._forget(wish)
                continue
            if machine.released and machine.actor != "ALIVE":
                self._cancel(wish)
            found.append(machine)
        return tuple(found)

    def request(self, wish: Wish, program: Sequence[str], patience: float) -> tuple[Found, ...]:
        """Asks for a machine, unless there is one of that name; all of them."""
        key = key_of(self._fleet, wish.name).encode()
        self._store.internal_kv_put(key, msgspec.json.encode(wish), False, STORE, timeout=SECONDS)
        there = self._wish(key)
        if there is not None and not self._facts(there) and self._handle(there) is None:
            self._make(there, program, patience)
        return self.list()

    def release(self, name: str) -> tuple[Found, ...]:
        """Gives a machine back, or takes the wish for it back; what is left."""
        if (wish := self._wish(key_of(self._fleet, name).encode())) is not None:
            self._store.internal_kv_put(self._key(wish, "released"), b"1", True, STORE, timeout=SECONDS)
        return self.list()

    def _make(self, wish: Wish, program: Sequence[str], patience: float) -> None:
        """Makes the actor. It waits for a node by itself, and Ray's autoscaler sees it waiting."""
        amounts = dict(wish.resources)
        actor: Any = self._ray.remote(RayMachine).options(
            name=wish.actor, namespace=self._namespace, lifetime="detached", max_restarts=0,
            num_cpus=amounts.pop("CPU", 0), num_gpus=amounts.pop("GPU", 0), resources=amounts,
            label_selector=dict(wish.labels),
        ).remote(self._fleet, msgspec.json.encode(wish), tuple(program), patience)  # fmt: skip
        self._store.internal_kv_put(
            self._key(wish, "actor"), actor._ray_actor_id.hex().encode(), True, STORE, timeout=SECONDS
        )

    def _find(self, wish: Wish, nodes: Sequence[dict[str, Any]], draining: dict[str, int]) -> Found:
        facts = self._facts(wish)
        actor = self._actor(wish, facts)
        node = actor.get("Address", {}).get("NodeID", "")
        died, reason = death(actor.get("DeathCause"))
        return Found(
            wish=wish,
            actor=actor.get("State", ""),
            died=died,
            reason=reason,
            released="released" in facts,
            ended=int(facts["ended"]) if "ended" in facts else None,
            drained=draining[node] / 1000 if node in draining else None,
            fits=any(fits(wish, each["Resources"], each["Labels"]) for each in nodes),
        )

    def _actor(self, wish: Wish, facts: dict[str, str]) -> dict[str, Any]:
        """What Ray knows of an actor, nothing if there is none."""
        from ray._private.state import actors

        number = facts.get("actor", "")
        if not number:  # it was made, and who made it died before that was written
            handle = self._handle(wish)
            number = "" if handle is None else handle._ray_actor_id.hex()
        known: dict[str, Any] = actors(number) if number else {}
        return known

    def _handle(self, wish: Wish) -> Any:
        try:
            return self._ray.get_actor(wish.actor, self._namespace)
        except ValueError:
            return None

    def _cancel(self, wish: Wish) -> None:
        """Ends an actor that has not begun."""
        if (handle := self._handle(wish)) is not None:
            self._ray.kill(handle)

    def _forget(self, wish: Wish) -> None:
        """The wish goes first: without it the rest means nothing."""
        self._store.internal_kv_del(key_of(self._fleet, wish.name).encode(), False, STORE, timeout=SECONDS)
        self._store.internal_kv_del(self._key(wish, ""), True, STORE, timeout=SECONDS)

    def _wishes(self) -> Sequence[Wish]:
        """In the order in which they were made."""
        prefix = key_of(self._fleet, "").encode()
        keys = self._store.internal_kv_keys(prefix, STORE, timeout=SECONDS)
        wishes = [self._wish(key) for key in keys if b"/" not in key.removeprefix(prefix)]
        return sorted((wish for wish in wishes if wish is not None), key=lambda wish: (wish.created, wish.name))

    def _wish(self, key: bytes) -> Wish | None:
        said = self._store.internal_kv_get(key, STORE, timeout=SECONDS)
        return None if said is None else msgspec.json.decode(said, type=Wish)

    def _facts(self, wish: Wish) -> dict[str, str]:
        keys = [self._key(wish, fact) for fact in ("actor", "released", "ended")]
        said = self._store.internal_kv_multi_get(keys, STORE, timeout=SECONDS)
        return {key.decode().rpartition("/")[2]: value.decode() for key, value in said.items()}

    def _key(self, wish: Wish, fact: str) -> bytes:
        return fact_key(self._fleet, wish.name, wish.life, fact).encode()


def death(cause: Any) -> tuple[str, str]:
    """Why an actor is dead: as one word and in Ray's own ones; empty if it is not said."""
    kind = cause.WhichOneof("context") if cause is not None else None
    if kind is None:
        return "", ""
    context = getattr(cause, kind)
    said = next((str(getattr(context, name)) for name in ("error_message", "formatted_exception_string")
                 if hasattr(context, name)), "")  # fmt: skip
    if kind == "actor_unschedulable_context":
        return "UNSCHEDULABLE", said
    if kind in ("creation_task_failure_context", "runtime_env_failed_context"):
        return "FAILED", said
    if kind == "actor_died_error_context":
        return context.DESCRIPTOR.fields_by_name["reason"].enum_type.values_by_number[context.reason].name, said
    return kind, said


def answer(connection: Connection, ask: Ask) -> Answer:
    """Carries a request out."""
    import ray.exceptions

    try:
        match ask.verb:
            case "list":
                return Answer(found=connection.list())
            case "request" if ask.wish is not None:
                return Answer(found=connection.request(ask.wish, ask.program, ask.patience))
            case "release":
                return Answer(found=connection.release(ask.name))
            case _:
                raise ProviderRefused(f"{ask.verb} without what it is about")
    except ProviderError as problem:
        return Answer(error=type(problem).__name__, message=str(problem))
    except (ray.exceptions.RayError, OSError, RuntimeError) as problem:
        return Answer(error="ProviderUnavailable", message=f"Ray does not do {ask.verb}: {problem}")


def main() -> None:
    """Serves until its input ends. Arguments: the cluster's address, the fleet."""
    requests, answers = sys.stdin, own_output()

    def say(what: Answer) -> None:
        answers.write(msgspec.json.encode(what).decode() + "\n")
        answers.flush()

    try:
        connection = Connection(*sys.argv[1:])
    except ProviderError as problem:
        say(Answer(error=type(problem).__name__, message=str(problem)))
        return
    say(Answer())
    for line in requests:
        say(answer(connection, msgspec.json.decode(line, type=Ask)))


def own_output() -> TextIO:
    """Standard output for answers alone: whatever else is printed goes where errors go."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    mine = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return mine


if __name__ == "__main__":
    main()
