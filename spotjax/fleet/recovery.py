"""Takes up the mesh and the requests of a controller that is gone, as if this one had suspended them. Pure.

The tokens are in the commit log. Of the KV, what workers still have is laid out here as the stopped replicas that it
was part of; from there on a recovery is a change of the mesh like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile

from spotjax.engine.batch import Batch, StepResult
from spotjax.engine.pages import PageAllocator
from spotjax.engine.prefix_cache import Tokens
from spotjax.engine.request import RequestState
from spotjax.engine.scheduler import Limits, Scheduler
from spotjax.engine.sequence import Sequence as ScheduledSequence
from spotjax.errors import InstanceLost
from spotjax.reshard.transfer import Remains


class StoppedPipeline:
    """Of a replica that runs no more. An ``engine.batch.Pipeline``."""

    ahead = False

    def __init__(self, depth: int) -> None:
        self.depth = depth

    async def run(self, batch: Batch) -> StepResult:
        """Raises InstanceLost."""
        raise InstanceLost("the replica belongs to a mesh that has stopped")


def certain(state: RequestState) -> int:
    """Positions of a sequence whose KV can be used if it is there; the last one's is computed to get the next token."""
    return max(0, state.length - 1)


def common_remains(
    stages: Mapping[tuple[int, int], Sequence[tuple[int, tuple[int, ...], int]]],
) -> dict[int, dict[int, tuple[tuple[int, ...], int]]]:
    """What all stages of a replica that are still there have in common.

    Args:
      stages: by replica and stage: (key of a sequence, its pages, positions whose KV is in them).

    Returns: by replica: key to pages and positions. A sequence whose pages stages do not agree on is left out: one of
      them did not hear of the last step that it was part of, and of pages that changed hands.
    """
    replicas: dict[int, list[dict[int, tuple[tuple[int, ...], int]]]] = {}
    for (replica, _), sequences in sorted(stages.items()):
        replicas.setdefault(replica, []).append({key: (pages, positions) for key, pages, positions in sequences})
    common: dict[int, dict[int, tuple[tuple[int, ...], int]]] = {}
    for replica, kept in replicas.items():
        common[replica] = {}
        for key in set.intersection(*(set(one) for one in kept)):
            shortest = min((one[key][0] for one in kept), key=len)
            if all(one[key][0][: len(shortest)] == shortest for one in kept):
                common[replica][key] = shortest, min(one[key][1] for one in kept)
    return common


def recalled(
    remains: Remains,
    sequences: Mapping[int, ScheduledSequence],
    limits: Callable[[int], Limits],
    pages: int,
    page_size: int,
    *,
    caching: bool = False,
) -> list[Scheduler]:
    """The replicas of a mesh as their schedulers were, with the sequences that have KV there.

    Where nobody of a replica is left, there may be copies of its pages elsewhere: such replicas get the sequences that
    no other has, at pages that mean nothing.

    Args:
      remains: what is left of the mesh.
      sequences: all that have not ended, by key. Those that are placed get their pages and watermark.
      limits: of a replica whose pipeline is that deep.
      pages, page_size: KV pages of one replica, page 0 included.
      caching: whether sequences may share the pages of their common prefix.
    """
    placement = remains.placement
    schedulers = [
        Scheduler(limits(placement.shape.stage), PageAllocator(pages, page_size, caching=caching))
        for _ in range(placement.shape.data)
    ]
    placed: set[int] = set()
    for replica, kept in remains.sequences.items():
        content: dict[int, Tokens] = {}
        usable = {
            key: min(positions, certain(sequences[key].state), len(numbers) * page_size)
            for key, (numbers, positions) in kept.items()
            if key in sequences and key not in placed
        }
        for key in sorted(usable, key=lambda key: (-usable[key], key)):  # who has all of a page before who has less
            placed |= _place(schedulers[replica], sequences[key], kept[key][0], usable[key], content)
    for replica in range(placement.shape.data):
        if remains.holders.isdisjoint(placement.instances(replica)):
            for key in sorted(sequences.keys() - placed):
                placed |= _place_anywhere(schedulers[replica], sequences[key])
    return schedulers


def _place(
    scheduler: Scheduler,
    sequence: ScheduledSequence,
    numbers: Sequence[int],
    positions: int,
    content: dict[int, Tokens],
) -> frozenset[int]:
    """Gives a sequence the pages that hold its KV. Returns its key, nothing if it cannot have them.

    Its first pages may be another's as well, full ones with the same tokens. ``content`` has the tokens up to the end
    of every full page, and is told those of this sequence. A full page of another is not completed by this one.
    """
    number, partial = divmod(positions, scheduler.pages.page_size)
    if partial and numbers[number] in content:
        positions -= partial
    wanted = list(numbers)[: scheduler.pages.needed(positions)]
    if not positions or len(set(wanted)) < len(wanted):
        return frozenset()
    full = {
        page: sequence.tokens(0, (number + 1) * scheduler.pages.page_size)
        for number, page in enumerate(wanted[: positions // scheduler.pages.page_size])
    }
    shared = list(takewhile(lambda page: content.get(page) == full[page], full))
    try:
        scheduler.pages.claim(wanted[len(shared) :])
    except ValueError:  # another has them: what one worker said of them was out of date
        return frozenset()
    scheduler.pages.share(shared)
    content |= full
    sequence.pages, sequence.computed = wanted, positions
    scheduler.adopt(sequence)
    return frozenset((sequence.key,))


def _place_anywhere(scheduler: Scheduler, sequence: ScheduledSequence) -> frozenset[int]:
    needed = scheduler.pages.needed(certain(sequence.state))
    if not needed or needed > scheduler.pages.free:
        return frozenset()
    sequence.pages, sequence.computed = scheduler.pages.allocate(needed), certain(sequence.state)
    scheduler.adopt(sequence)
    return frozenset((sequence.key,))
