"""Unfinished requests as one Orbax checkpoint: what was asked for and every token so far.

The commit log is the truth; this is for who takes a service's requests elsewhere without it. As a pytree:

- ``records``: uint8[...], everything but what follows, as JSON: names, texts, sampling, lengths;
- ``tokens``: int32[...], of each request its prompt, then the output of each of its sequences;
- ``text_ends``: int32[...], of each sequence; ``logprobs``: float64[...], of each token its own, then the most likely
  ones'; ``likely``: int32[...], these tokens' ids;
- ``checksum``: uint64[1], xxh3 of the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

import msgspec
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from xxhash import xxh3_64

from spotjax.engine.commit_log import RecordedRequest
from spotjax.engine.log_records import AcceptedRecord, state_of
from spotjax.engine.request import Logprobs
from spotjax.errors import CheckpointError

T = TypeVar("T")


@dataclass(frozen=True)
class SavedGeneration:
    """What a checkpoint of generation state has.

    Attributes:
      identity: of the service.
      epoch: of its mesh when it was saved.
      requests: in order of acceptance.
    """

    identity: str
    epoch: int
    requests: tuple[RecordedRequest, ...]


class _Lengths(msgspec.Struct, frozen=True, array_like=True):
    """Of one sequence's parts of the arrays.

    Attributes:
      tokens, text_ends: how many.
      likely: how many of the most likely tokens there are with each token that has log-probabilities.
    """

    tokens: int
    text_ends: int
    likely: tuple[int, ...]


class _Record(msgspec.Struct, frozen=True):
    """A request without what is in arrays.

    Attributes:
      accepted: without tokens, text ends and log-probabilities.
      prompt: its length.
      sequences: by choice.
    """

    accepted: AcceptedRecord
    prompt: int
    sequences: tuple[_Lengths, ...]


class _Records(msgspec.Struct, frozen=True):
    identity: str
    epoch: int
    requests: tuple[_Record, ...]


def save_generation(directory: epath.PathLike, requests: Iterable[RecordedRequest], identity: str, epoch: int) -> None:
    """Saves requests; the checkpoint is there as a whole or not at all.

    Args:
      directory: that is to be the checkpoint; nothing may be there.
      requests: in order of acceptance.
      identity: of the service.
      epoch: of its mesh.

    Raises:
      CheckpointError: it cannot be written, or is there already.
    """
    tree = generation_tree(SavedGeneration(identity, epoch, tuple(requests)))
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(epath.Path(directory), tree)
    except (ValueError, OSError) as problem:
        raise CheckpointError(f"generation state cannot be saved in {directory}: {problem}") from problem


def load_generation(directory: epath.PathLike) -> SavedGeneration:
    """Reads what ``save_generation`` saved.

    Raises:
      CheckpointError: there is none, or it is damaged.
    """
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            return generation_of(checkpointer.restore(epath.Path(directory)))
    except (ValueError, KeyError, OSError, msgspec.MsgspecError) as problem:
        raise CheckpointError(f"no generation state can be read from {directory}: {problem}") from problem


def generation_tree(saved: SavedGeneration) -> dict[str, np.ndarray]:
    """The pytree. Arrays without elements, which Orbax does not save, are left out."""
    tokens, text_ends, likely, records = list[int](), list[int](), list[int](), list[_Record]()
    logprobs: list[float] = []
    for recorded in saved.requests:
        accepted = AcceptedRecord.of(recorded.request, recorded.states, recorded.key)
        tokens += recorded.request.prompt
        lengths = []
        for state in recorded.states:
            tokens += state.tokens
            text_ends += state.text_ends
            for token, top in state.logprobs:
                logprobs += (token, *(value for _, value in top))
                likely += (other for other, _ in top)
            tops = tuple(len(top) for _, top in state.logprobs)
            lengths.append(_Lengths(len(state.tokens), len(state.text_ends), tops))
        records.append(_Record(_without_arrays(accepted), len(recorded.request.prompt), tuple(lengths)))
    encoded = msgspec.json.encode(_Records(saved.identity, saved.epoch, tuple(records)))
    leaves: dict[str, np.ndarray] = {
        "records": np.frombuffer(encoded, np.uint8),
        "tokens": np.array(tokens, np.int32),
        "text_ends": np.array(text_ends, np.int32),
        "logprobs": np.array(logprobs, np.float64),
        "likely": np.array(likely, np.int32),
    }
    tree = {name: leaf for name, leaf in leaves.items() if leaf.size}
    return tree | {"checksum": np.array([_checksum(tree)], np.uint64)}


def generation_of(tree: Mapping[str, np.ndarray]) -> SavedGeneration:
    """What ``generation_tree`` was made of.

    Raises:
      ValueError: the checksum is another.
      KeyError, msgspec.DecodeError: it is the tree of something else.
    """
    leaves = {name: leaf for name, leaf in tree.items() if name != "checksum"}
    if tree["checksum"][0] != _checksum(leaves):
        raise ValueError("its checksum is another")
    tokens, text_ends, logprobs, likely = (
        iter(leaves[name].tolist() if name in leaves else ()) for name in ("tokens", "text_ends", "logprobs", "likely")
    )
    records = msgspec.json.decode(leaves["records"].tobytes(), type=_Records)
    requests = []
    for record in records.requests:
        request = replace(record.accepted.request, prompt=_take(tokens, record.prompt))
        accepted = msgspec.structs.replace(record.accepted, request=request)
        states = tuple(
            state_of(
                accepted,
                choice,
                msgspec.structs.replace(
                    accepted.start[choice],
                    tokens=_take(tokens, lengths.tokens),
                    text_ends=_take(text_ends, lengths.text_ends),
                    logprobs=tuple(
                        Logprobs(next(logprobs), tuple(zip(_take(likely, top), _take(logprobs, top), strict=True)))
                        for top in lengths.likely
                    ),
                ),
            )
            for choice, lengths in enumerate(record.sequences)
        )
        requests.append(RecordedRequest(request, states, accepted.key))
    return SavedGeneration(records.identity, records.epoch, tuple(requests))


def _without_arrays(accepted: AcceptedRecord) -> AcceptedRecord:
    start = tuple(msgspec.structs.replace(part, tokens=(), text_ends=(), logprobs=()) for part in accepted.start)
    return msgspec.structs.replace(accepted, request=replace(accepted.request, prompt=()), start=start)


def _take(values: Iterator[T], count: int) -> tuple[T, ...]:
    return tuple(islice(values, count))


def _checksum(leaves: Mapping[str, np.ndarray]) -> int:
    digest = xxh3_64()
    for name in sorted(leaves):
        digest.update(name.encode())
        digest.update(leaves[name].tobytes())
    return digest.intdigest()
