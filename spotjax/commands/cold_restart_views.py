"""What a cold restart and a bundle look like to people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from spotjax.commands.output import shown_bytes

if TYPE_CHECKING:
    from spotjax.checkpoint.bundle import Bundle
    from spotjax.tools.cold_restart import PlannedMesh, Restoration

REQUESTS_SHOWN = 20


def restoration_view(found: Restoration) -> RenderableType:
    """Everything."""
    return Group(*_summary(found), *_requests(found), *_mesh(found.mesh))


def _summary(found: Restoration) -> Iterator[str]:
    yield f"service {found.service}, model {escape(found.model)}, last epoch {found.epoch}"
    if found.user:
        yield f"[yellow]the log is in use by process {found.user}; it may go on meanwhile[/yellow]"
    for line in found.damage:
        yield f"[red]damaged:[/red] {escape(line)}"
    leaving = len(found.unfinished) - found.going_on
    ends = f", {leaving} end, for their clients cannot come back" if leaving else ""
    yield f"{found.going_on} unfinished requests go on{ends}; {found.finished} finished ones can still be read"
    if found.going_on:
        kept = f"at most {found.kv_positions} positions, of {found.with_kv} requests" if found.save else "none"
        yield f"saved KV: {kept}; {found.recomputed_positions} positions are computed again"
        if found.save:
            yield f"save: {escape(found.save)}"


def _requests(found: Restoration) -> Iterator[RenderableType]:
    if not found.unfinished:
        return
    table = Table(title="unfinished requests", title_justify="left")
    for heading in ("request", "prompt", "tokens so far", "KV", "computed again"):
        table.add_column(heading, justify="left" if heading == "request" else "right", no_wrap=heading != "request")
    for request in found.unfinished[:REQUESTS_SHOWN]:
        tokens = " ".join(map(str, request.tokens))
        kv = (str(request.kv_positions), str(request.recomputed_positions)) if request.resumable else ("ends", "")
        table.add_row(escape(request.request_id), str(request.prompt_tokens), tokens, *kv)
    yield table
    if (more := len(found.unfinished) - REQUESTS_SHOWN) > 0:
        yield f"... and {more} more"


def _mesh(mesh: PlannedMesh | None) -> Iterator[RenderableType]:
    if mesh is None:
        yield "the mesh is chosen when workers have joined; --assume shows it for instances that are named"
        return
    table = Table(title=f"mesh {mesh.placement.shape}: parameters to read", title_justify="left")
    table.add_column("instance")
    table.add_column("from the checkpoint", justify="right")
    table.add_column("from others", justify="right")
    for instance, loaded in mesh.loaded.items():
        table.add_row(instance, shown_bytes(loaded), shown_bytes(mesh.received[instance]))
    yield table
    if mesh.idle:
        yield f"not needed: {', '.join(mesh.idle)}"


def bundle_text(bundle: Bundle) -> str:
    """``service ..., 3 requests (2 unfinished), ...``."""
    parts = [
        f"service {bundle.service}" + (f" of {bundle.model_name}" if bundle.model_name else ""),
        f"{bundle.requests} requests ({bundle.unfinished} unfinished)",
        f"KV of {bundle.sequences_with_kv} sequences",
        "with parameters" if bundle.parameters else "without parameters",
        shown_bytes(bundle.bytes),
    ]
    return ", ".join(parts)
