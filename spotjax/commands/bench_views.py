"""What ``spotjax bench`` shows: the figures of a run, or a line for each point of a sweep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from spotjax.bench.statistics import Distribution, Summary
from spotjax.bench.sweep import Result

BUSY = 0.8
"""Share of a processor from which on this client may be what is measured."""
NAMES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "inter-token latency",
    "e2el": "end-to-end latency",
}


def results_view(results: Sequence[Result], settings: Mapping[str, Any]) -> RenderableType:
    """Everything."""
    where = f"{settings['model']} by {settings['api']} at {settings['server']}"
    if len(results) == 1:
        return Group(f"[bold]{escape(where)}[/bold], {results[0].point.name}", *run_view(results[0].summary))
    return Group(f"[bold]{escape(where)}[/bold]", *sweep_views(results))


def run_view(summary: Summary) -> Iterator[RenderableType]:
    """One run: what came of it, and its times."""
    ended = f"{summary.completed} requests completed, {summary.failed} failed"
    if summary.interrupted:
        ended += f", {summary.interrupted} cut off"
    yield f"{ended} in {summary.duration:.1f} s; {summary.most_in_flight} at the same time at most"
    for kind, count in summary.failures.items():
        yield f"  {count} failed: {escape(kind)}"
    goodput = "" if summary.request_goodput is None else f"; goodput {summary.request_goodput:.3g}"
    yield f"requests per second: {summary.request_throughput:.3g}{goodput}"
    yield (
        f"tokens per second: output {summary.output_throughput:.4g} (of {summary.total_output_tokens}), "
        f"most in a second {summary.max_output_tokens_per_s:.4g}; "
        f"with input {summary.total_token_throughput:.4g} (of {summary.total_input_tokens})"
    )
    if summary.ttft is not None:
        percentiles = [f"p{percent:g}" for percent, _ in summary.ttft.percentiles]
        table = _table("milliseconds", "mean", "std", *percentiles, "most")
        for key, name in NAMES.items():
            values: Distribution | None = getattr(summary, key)
            if values is not None:
                cells = (values.mean, values.std, *(value for _, value in values.percentiles), values.most)
                table.add_row(name, *map(_ms, cells))
        yield table


def sweep_views(results: Sequence[Result]) -> Iterator[Table]:
    """A line for each point: what came of it, and its times: medians and the highest percentile that was asked for."""
    table = _table("throughput", "completed", "failed", "requests/s", "goodput", "output tokens/s", "at a time")
    for result in results:
        summary, goodput = result.summary, result.summary.request_goodput
        table.add_row(
            escape(result.point.name), str(summary.completed), str(summary.failed), f"{summary.request_throughput:.3g}",
            "-" if goodput is None else f"{goodput:.3g}", f"{summary.output_throughput:.4g}",
            str(summary.most_in_flight),
        )  # fmt: skip
    yield table
    asked = [percent for result in results if (ttft := result.summary.ttft) for percent, _ in ttft.percentiles]
    if asked:
        table = _table("milliseconds: median, percentile")
        for name in ("TTFT", "TPOT", "ITL", "E2EL"):
            table.add_column(name, justify="right")
            table.add_column(f"p{max(asked):g}", justify="right")
        for result in results:
            summary, cells = result.summary, list[str]()
            for values in (summary.ttft, summary.tpot, summary.itl, summary.e2el):
                cells += ["-", "-"] if values is None else [_ms(values.median), _ms(values.at(max(asked)))]
            table.add_row(escape(result.point.name), *cells)
        yield table


def warnings(results: Sequence[Result]) -> Iterator[str]:
    """What has to be known of the figures."""
    for result in results:
        run, summary, name = result.run, result.summary, result.point.name
        examples = {e.failure.kind: e.failure.message for e in reversed(run.exchanges) if e.failure is not None}
        for kind, count in summary.failures.items():
            yield f"{name}: {count} requests failed: {kind}, such as: {examples[kind]}"
        if run.interrupted:
            yield f"{name}: interrupted; the figures are of what was complete by then"
        if run.duration and run.cpu_seconds / run.duration > BUSY:
            yield (
                f"{name}: this client computed for {run.cpu_seconds / run.duration:.0%} of the time: it may be slower "
                "than the server"
            )
        if summary.uncounted_outputs:
            yield (
                f"{name}: the server did not say how many tokens {summary.uncounted_outputs} answers have; they were "
                "counted with --tokenizer, or as one token for each piece"
            )
        short = Counter(
            e.output_tokens < e.request.output_tokens for e in run.exchanges if e.failure is None and e.output_tokens
        )
        if short[True]:
            yield f"{name}: {short[True]} answers ended before they were as long as asked for; see --ignore-eos"


def _table(title: str, *headings: str) -> Table:
    """Without rows: a column of names, then numbers."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f}"
