"""What this worker knows of the KV on its stages, who is given copies of it, and what copies of others' KV it has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from spotjax.checkpoint.kv_format import KvFormat
from spotjax.protocol import control
from spotjax.reshard.kv import KvMover
from spotjax.reshard.transfer import PageTransfer
from spotjax.runtime.stage import Stage
from spotjax.worker.backup import Backup
from spotjax.worker.copies import Copies
from spotjax.worker.ledger import StageLedger
from spotjax.worker.links import Links

if TYPE_CHECKING:
    from spotjax.worker.saving import KvSave

Place = tuple[int, int]
"""Replica and stage number."""


class KvKeeping:
    """One worker's.

    Args:
      name: of the instance.
      kv: reads pages.
      form: of the model's KV, whoever's it is.
      copies: of others' KV.
      links: to whoever is given copies.

    Attributes:
      ledgers: of the current stages, but for those that span hosts of a TPU slice, none of which has all kv heads.
      keeper: the instance that is given copies; empty if there is none.
    """

    def __init__(self, name: str, kv: KvMover, form: KvFormat, copies: Copies, links: Links) -> None:
        self.copies = copies
        self.ledgers: dict[Place, StageLedger] = {}
        self.keeper = ""
        self._name, self._kv, self._form, self._links = name, kv, form, links
        self._backup: Backup | None = None
        self._save: KvSave | None = None
        self._wanted_save = ""

    @property
    def service(self) -> str:
        """Whose sequences these are; empty if nobody's yet."""
        return self.copies.store.service

    def serve(self, service: str, epoch: int) -> None:
        """Serves that from now on, in meshes after that epoch."""
        self.copies.store.service = service
        self.copies.store.ignore(epoch)
        self._form = msgspec.structs.replace(self._form, service=service)
        self.copies.use_save("", self._form, {})

    def coverage(self, wanted: control.Coverage) -> tuple[int, ...]:
        """What it asks for, by sequence. May read from disk."""
        self.copies.use_save(wanted.save, self._form, dict(wanted.saved))
        return self.copies.positions(wanted.layers, wanted.sequences)

    def forget(self, sequences: Sequence[int]) -> None:
        """These have ended: their copies are of no use any more."""
        self.copies.store.forget(sequences)
        for ledger in self.ledgers.values():
            ledger.forget(sequences)

    def keep(self, certain: Mapping[int, int], epoch: int) -> None:
        """Only these sequences count from now on, each with no more than so many positions, up to that epoch."""
        self.copies.store.keep(certain, epoch)
        for ledger in self.ledgers.values():
            ledger.keep(certain)

    def remains(self) -> tuple[control.StageRemains, ...]:
        """What is on the stages."""
        return tuple(control.StageRemains(*place, ledger.remains()) for place, ledger in self.ledgers.items())

    def make_way(self, transfers: Iterable[PageTransfer], heirs: Mapping[int, int]) -> None:
        """Tells ledgers which pages KV of other replicas comes into, where a replica goes on with the pages it has."""
        transfers = list(transfers)
        for (data, _), ledger in self.ledgers.items():
            coming = [t for t in transfers if t.old != data and t.new == heirs.get(data)]
            ledger.overwrite(new for transfer in coming for _, new in transfer.pages)

    def adopt(self, stages: Mapping[Place, Stage], epoch: int, keeper: str, bandwidth: int) -> None:
        """These are the stages from now on; their KV is copied to that instance, to nobody if there is no name."""
        before, self.ledgers = self.ledgers, {}
        for place, stage in stages.items():
            if stage.own == stage.devices:
                known = next((ledger for ledger in before.values() if ledger.stage is stage), None)
                self.ledgers[place] = known or StageLedger(stage, self._form.page_size)
                self.ledgers[place].epoch = epoch
        self._back_up_to(keeper, bandwidth)
        for copier in (self._backup, self._save):
            if copier is not None:
                copier.install(self.ledgers.values())

    def expect_save(self, path: str) -> None:
        """That is where KV will be saved next: a save into another directory is given up."""
        self._wanted_save = path
        if (saving := self._save) is not None and saving.path != path:
            saving.hurry()

    def save(self, command: control.SaveKv) -> tuple[int, str]:
        """Carries it out. Blocks.

        Returns: bytes that are saved, when it was the last of it; why not all is, empty if it is.

        Raises:
          ConfigError: no KV of this worker can be saved.
        """
        from spotjax.worker.saving import KvSave  # Orbax, which most workers never need

        if self._save is not None and self._save.path != command.path:
            self._give_up_save()
        if self._wanted_save != command.path:
            return 0, "something else was more urgent"
        if self._save is None:
            self._save = KvSave(self._kv, command.path, self._name, self._form)
            self._save.install(self.ledgers.values())
        if not command.last:
            return 0, ""
        saving = self._save
        try:
            left_out = saving.finish(command.seconds if self._wanted_save == command.path else 0)
            return saving.bytes, left_out
        finally:
            if self._save is saving:
                self._save = None

    def hurry(self) -> None:
        """There is something better to do than to wait for the end of a save, also of one that is yet to begin."""
        self._wanted_save = ""
        if (saving := self._save) is not None:
            saving.hurry()

    def rest(self) -> None:
        """Gives nobody copies any more. Blocks."""
        self._end_backup()
        self._give_up_save()

    def clear(self) -> None:
        """Knows of nothing any more, and has no copies but those on disk."""
        self.rest()
        self.copies.store.clear()
        self.ledgers = {}

    def _back_up_to(self, keeper: str, bandwidth: int) -> None:
        """Has KV copied to that instance from now on; anew if it was another one before, or has been away.

        Waits for nobody: streams stand still meanwhile, and whoever kept copies before may be out of reach.
        """
        if keeper == self.keeper and self._backup is not None and self._links.connected(keeper):
            return
        self._end_backup()
        if keeper:
            self._backup = Backup(self._kv, self.service, partial(self._links.push, keeper), bandwidth)
            self.keeper = keeper

    def _end_backup(self) -> None:
        if self._backup is not None:
            self._backup.stop()
        self._backup, self.keeper = None, ""

    def _give_up_save(self) -> None:
        saving, self._save = self._save, None
        if saving is not None:
            saving.finish(0)
