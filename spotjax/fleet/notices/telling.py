"""From a worker that hears of its machine's end to the others: how long it may go on, and the words as messages."""

from __future__ import annotations

from dataclasses import replace
from math import inf

from spotjax.fleet.notices.listen import shortened
from spotjax.fleet.notices.notice import Notice, NoticeKind, Withdrawn
from spotjax.fleet.notices.standing import Standing, Word, acted_on_from
from spotjax.protocol import control


def seconds_left(standing: Standing, now: float, *, ready: bool) -> float:
    """How long a worker may go on: until its machine's end, or, if it cannot be given work yet, until that is near."""
    notice = standing.notice
    begin = acted_on_from(notice)
    if begin == inf:
        return inf
    if not ready:
        return max(0.0, begin - now)
    assert notice is not None and notice.deadline is not None, "only advice has no deadline"
    return max(0.0, notice.deadline - now)


def message_of(word: Word, now: float) -> control.Noticed | control.NoticeWithdrawn:
    """A word as it is sent: seconds left travel, moments do not."""
    evidence = shortened(word.evidence)
    if isinstance(word, Withdrawn):
        return control.NoticeWithdrawn(word.source, evidence)
    seconds = None if word.deadline is None else max(0.0, word.deadline - now)
    return control.Noticed(word.source, word.kind.value, seconds, evidence)


def word_of(message: control.Noticed | control.NoticeWithdrawn, instance: str, now: float) -> Word:
    """What a message says, about an instance, at its arrival."""
    if isinstance(message, control.NoticeWithdrawn):
        return Withdrawn(message.source, instance, message.evidence)
    deadline = None if message.seconds is None else now + message.seconds
    return Notice(message.source, NoticeKind(message.kind), instance, deadline, message.evidence)


def of_host(word: Word, host: int) -> Word:
    """A word of one host of a slice: the hosts are told one by one, and what any of them hears is the whole slice's."""
    return replace(word, source=f"{word.source}@host-{host}") if host else word
