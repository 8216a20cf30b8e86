"""``spotjax simulate``: serving systems on recorded or drawn traces, in simulated time. Starts nothing."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from spotjax.commands.arguments import add_command
from spotjax.errors import ConfigError
from spotjax.sim.assumptions import Assumptions

if TYPE_CHECKING:
    from collections.abc import Callable

    from spotjax.commands.arguments import Commands
    from spotjax.sim.results import Outcome, Summary

    Told = Callable[[float], None]

EXAMPLES = """\
  spotjax simulate --model gpt-20b --spot A_S --requests gamma:rate=0.35,cv=6 --seeds 5
  spotjax simulate --model gpt-20b --spot B_S --requests artifact:rate=0.35 --systems spotjax,on-demand:8 --notice 0
  spotjax simulate --model opt-6.7b --spot spot.csv --requests azure.csv --rate 1.5 --plot day.png --json day.json
  spotjax simulate --model llama-3-8b --instance-type g5.12xlarge --spot market:instances=12,duration=3600
      --requests poisson:rate=2,prompt=1000,prompt_cv=1,output=200,output_cv=1 --systems spotjax

spot traces:
  A_S, B_S, A_S+O, B_S+O, A'_S+O, B'_S+O   segments of the SpotServe paper; they set --start
  market:instances=N,duration=S            drawn from a market fitted to recorded g4dn.12xlarge (also: batch_scale)
  constant:instances=N,duration=S          N spot instances that nobody takes away
  FILE                                     CSV of Spotjax, segment or record of SpotServe, SkyPilot
requests:
  gamma:rate=R,cv=X      gaps with a true coefficient of variation X
  poisson:rate=R         gaps of CV 1
  artifact:rate=R,cv=X   as SpotServe's artifact draws them: what it calls CV 6 is almost regular
  fluctuating:cv=X       the paper's fluctuating rates; without cv as its artifact draws them
  FILE                   CSV of Spotjax, Azure LLM inference, Mooncake, queries of SpotServe
  All generators also take prompt=, output= (mean tokens: 512, 128), prompt_cv=, output_cv= (0; lognormal lengths).
systems:
  spotjax            the policies of this server; spotjax-late leaves instances when it must, spotjax-fallback rents
                     on demand what is missing
  spotjax-no-X       without X: optimizer, matcher, migration, arranger, backup, precopy
  spotserve          as published; needs published tables: opt-6.7b, gpt-20b, llama-30b on g4dn.12xlarge;
                     spotserve-as-baselines gives busy replicas as many batches ahead, spotserve-new-batching none
  reparallelization  its first baseline: best shape, restart from storage
  rerouting          its second baseline: fixed pipelines, requests begin again elsewhere
  skyserve           after SkyServe: whole replicas, spare ones, on demand in reserve; nothing is moved
  SYSTEM:N           that system on N on-demand instances instead; on-demand:N is spotjax:N
"""

DEFAULT_SYSTEMS = "spotjax,spotserve,reparallelization,rerouting"


@dataclass(frozen=True)
class Experiment:
    """What was simulated.

    Attributes:
      outcomes: by the system's name, one for each seed.
      summaries: of these.
      assumptions: of all of them.
    """

    outcomes: dict[str, list[Outcome]]
    summaries: dict[str, list[Summary]]
    assumptions: Assumptions


def add_commands(commands: Commands) -> None:
    """Adds the command, with a flag for everything that a simulation assumes."""
    parser = add_command(commands, "simulate", run, "simulate serving systems on traces of instances", EXAMPLES)
    add = parser.add_argument
    add("--model", required=True, metavar="PRESET", help="such as opt-6.7b or llama-3-70b; docs/models.md lists them")
    add("--quantization", choices=("none", "int8"), default="none", help="of matrices (default: none)")
    add("--instance-type", default="g4dn.12xlarge", metavar="TYPE", help="of all instances (default: g4dn.12xlarge)")
    add("--tensor-instances", type=int, default=1, metavar="COUNT", help="that a tensor group may span (default: 1; the"
        " published systems take what their tables have)")  # fmt: skip
    add("--profile", metavar="SOURCE", help="latencies: roofline, published, or a file of spotjax profile")
    add("--spot", required=True, metavar="TRACE", help="instances that come and go, see below")
    add("--spot-window", metavar="START:STOP", help="seconds of the spot trace to take")
    add("--spot-limit", type=int, metavar="COUNT", help="most instances to take of it at a time")
    add("--requests", required=True, metavar="TRACE", help="requests that come, see below")
    add("--request-window", metavar="START:STOP", help="seconds of the requests to take")
    add("--rate", type=float, metavar="PER_SECOND", help="stretch arrivals until so many come in a second")
    add("--max-prompt", type=int, metavar="TOKENS", help="cut longer prompts")
    add("--max-output", type=int, metavar="TOKENS", help="cut longer outputs")
    add("--systems", default=DEFAULT_SYSTEMS, metavar="NAME,...", help=f"see below (default: {DEFAULT_SYSTEMS})")
    add("--required-rate", type=float, metavar="PER_SECOND", help="what the published systems plan for (default: as in"
        " the paper on its segments, else the mean rate)")  # fmt: skip
    add("--seeds", type=int, default=1, metavar="COUNT", help="runs of each system with other draws (default: 1)")
    add("--first-seed", type=int, default=0, metavar="SEED", help="seed of the first of them (default: 0)")
    add("--split-cost", choices=("tokens", "time"), default="tokens", help="share cost between prompts and outputs by"
        " their tokens, or by an estimate of the time that they take (default: tokens)")  # fmt: skip
    add("--plot", type=Path, metavar="FILE.png", help="draw what happened over time, for the first seed")
    add("--plot-comparison", type=Path, metavar="FILE.png", help="draw latencies of all systems")
    add("--json", type=Path, metavar="FILE", help="write all numbers, and every change of the mesh")
    add("--json-requests", action="store_true", help="write what became of every request, too")
    assumed = parser.add_argument_group("assumptions")
    for field in fields(Assumptions):
        metadata, default = field.metadata, field.default
        shown = f"{metadata['source']} (default: {default:g} {metadata['unit']})".replace("%", "%%")
        flag = flag_of(field.name)
        assumed.add_argument(flag, dest=field.name, type=float, metavar=metadata["unit"].upper(), help=shown)


def flag_of(assumption: str) -> str:
    """``--start`` of ``start_seconds``: the unit is in the help."""
    return "--" + assumption.removesuffix("_seconds").replace("_", "-")


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from rich.console import Console

    from spotjax.commands.simulate_views import experiment_view

    check_outputs(arguments)
    experiment = simulate_all(arguments)
    Console().print(experiment_view(experiment))
    write_files(arguments, experiment)
    return 0


def simulate_all(arguments: argparse.Namespace) -> Experiment:
    """Runs every system with every seed.

    Raises:
      ConfigError: an argument is wrong.
    """
    from spotjax.commands.simulate_inputs import assumptions_of, make_scenario, required_rate, seeds_of
    from spotjax.sim.experiment import prefill_share, simulate
    from spotjax.sim.systems.registry import system

    names, seeds, required = system_names(arguments.systems), seeds_of(arguments), required_rate(arguments)
    assumptions = assumptions_of(arguments)
    experiment = Experiment({name: [] for name in names}, {name: [] for name in names}, assumptions)
    with progress_bar(len(names) * len(seeds)) as told:
        for seed in seeds:
            scenario = make_scenario(arguments, assumptions, seed)
            for name in names:  # all of them before the first one runs
                system(name, scenario, required)
            for name in names:
                outcome = simulate(scenario, name, seed, required, told(f"{name}, seed {seed}"))
                share = prefill_share(outcome, scenario) if arguments.split_cost == "time" else None
                experiment.outcomes[name].append(outcome)
                experiment.summaries[name].append(outcome.summary(share))
    return experiment


def system_names(text: str) -> list[str]:
    """The systems that are asked for.

    Raises:
      ConfigError: there is none, or one is there twice.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"--systems: different names joined by commas, got {text!r}")
    return names


def check_outputs(arguments: argparse.Namespace) -> None:
    """Before anything that takes long: files can be written where they are asked for.

    Raises:
      ConfigError: one cannot; names the flag.
    """
    for name in ("plot", "plot_comparison", "json"):
        path = getattr(arguments, name)
        if path is not None and not path.resolve().parent.is_dir():
            raise ConfigError(f"--{name.replace('_', '-')}: there is no directory {path.resolve().parent}")
    if arguments.json_requests and not arguments.json:
        raise ConfigError("--json-requests needs --json FILE to write to")
    if arguments.plot or arguments.plot_comparison:
        from spotjax.sim.plots import require_matplotlib

        require_matplotlib()


def write_files(arguments: argparse.Namespace, experiment: Experiment) -> None:
    """Pictures and JSON, as asked for.

    Raises:
      ConfigError: a file cannot be written.
    """
    if arguments.plot:
        from spotjax.sim.plots import plot_timeline

        plot_timeline([runs[0] for runs in experiment.outcomes.values()], arguments.plot)
    if arguments.plot_comparison:
        from spotjax.sim.plots import plot_comparison

        plot_comparison(experiment.outcomes, arguments.plot_comparison)
    if arguments.json:
        from dataclasses import asdict

        from spotjax.sim.records import Record, encode

        records = [
            Record.of(outcome, summary, arguments.json_requests)
            for name, runs in experiment.outcomes.items()
            for outcome, summary in zip(runs, experiment.summaries[name], strict=True)
        ]
        try:
            arguments.json.write_bytes(encode(records, asdict(experiment.assumptions)))
        except OSError as problem:
            raise ConfigError(f"--json: {arguments.json} cannot be written: {problem}") from problem


@contextmanager
def progress_bar(runs: int) -> Iterator[Callable[[str], Told]]:
    """Shows on standard error how far the runs are, if that is a terminal. Gives what makes the listener of one run."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task, begun = progress.add_task("", total=runs), 0

        def next_run(description: str) -> Told:
            nonlocal begun
            before, begun = begun, begun + 1
            progress.update(task, description=description, completed=before)
            return lambda share: progress.update(task, completed=before + share)

        yield next_run
