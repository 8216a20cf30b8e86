"""``spotjax plan``: what the planner would do with given instances and load, and why. Starts nothing."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spotjax.commands.arguments import add_command
from spotjax.errors import ConfigError

if TYPE_CHECKING:
    from spotjax.commands.arguments import Commands
    from spotjax.meshes.instance import Instance
    from spotjax.meshes.placement import Placement
    from spotjax.models.quantization import Quantization
    from spotjax.models.spec import ModelSpec
    from spotjax.planner.capacity import Capacity
    from spotjax.planner.demand import Demand
    from spotjax.planner.kv_cohorts import LiveSequence
    from spotjax.planner.links import Links
    from spotjax.planner.optimizer import Decision
    from spotjax.planner.options import LatencyOf
    from spotjax.planner.plan import MigrationPlan

EXAMPLES = """\
  spotjax plan --model gpt-20b --instances 7xg4dn.12xlarge --rate 0.35
  spotjax plan --model llama-3-70b --instances 4xp5.48xlarge --rate 3 --latency-target 20
  spotjax plan --model gpt-20b --instances 7xg4dn.12xlarge --json > state.json
  spotjax plan --model gpt-20b --instances 6xg4dn.12xlarge --from state.json --plot migration.png

MODEL is a preset, such as llama-3-70b (docs/models.md lists them), or anything that spotjax serve takes.
Instances are named i-0, i-1, ... in order. With --from, those of the old state that are not among them are taken as
noticed: they can still send, but not serve.
"""


@dataclass(frozen=True)
class Study:
    """What the planner came to.

    Attributes:
      model, latencies: names of the model and of where latencies come from.
      spec, instances: what was planned for; noticed instances included.
      decision: the configuration.
      capacity: what to request or release for the load; None without one, and where the mesh is given.
      before, placement: the old mesh, if any, and the new one.
      kept_bytes: bytes of its needs that the device of each position already has, and all that it needs.
      plan, links: the migration and what it goes over.
      kept, recomputed: running sequences that keep their KV, and that compute it again.
    """

    model: str
    latencies: str
    spec: ModelSpec
    instances: Sequence[Instance]
    decision: Decision
    capacity: Capacity | None
    before: Placement | None
    placement: Placement
    kept_bytes: Mapping[Any, tuple[int, int]]
    plan: MigrationPlan
    links: Links
    kept: int
    recomputed: int


def add_commands(commands: Commands) -> None:
    """Adds the command."""
    parser = add_command(commands, "plan", run, "show which mesh would be chosen, and what would move", EXAMPLES)
    add = parser.add_argument
    add("--model", required=True, metavar="MODEL", help="model to plan for")
    add("--quantization", choices=("none", "int8"), default="none", help="of matrices (default: none)")
    add("--instances", required=True, metavar="COUNTxTYPE,...", help="instances, such as 7xg4dn.12xlarge")
    add("--tensor-instances", type=int, default=1, metavar="COUNT", help="that a tensor group may span (default: 1)")
    add("--rate", type=float, metavar="PER_SECOND", help="requests that arrive; without it throughput decides")
    add("--cv", type=float, default=1.0, metavar="X", help="coefficient of variation of arrivals (default: 1, Poisson)")
    add("--service-cv", type=float, default=0.0, metavar="X", help="the same of request lengths (default: 0)")
    add("--prompt", type=int, default=512, metavar="TOKENS", help="of a typical request (default: 512)")
    add("--output", type=int, default=128, metavar="TOKENS", help="of a typical request (default: 128)")
    add("--batch", type=int, default=8, metavar="COUNT", help="most sequences of a replica at once (default: 8)")
    add("--latency-target", type=float, metavar="SECONDS", help="keep requests under this at the least cost")
    add("--percentile", type=float, default=0.99, metavar="SHARE", help="of requests under the target (default: 0.99)")
    add("--cost-ceiling", type=float, metavar="USD", help="most that the instances in use may cost in an hour")
    add(
        "--loss-chance",
        type=float,
        default=0.0,
        metavar="P",
        help="prefer shapes that lose little if one instance goes",
    )
    add("--available", type=int, default=8, metavar="COUNT", help="more of the first type to be had (default: 8)")
    add("--mesh", metavar="DxPxM", help="take this mesh if it fits")
    add("--profile", metavar="SOURCE", help="latencies: roofline, published, or a file of spotjax profile")
    add(
        "--from",
        dest="state",
        type=Path,
        metavar="STATE.json",
        help="the mesh that serves now: --json of plan or status",
    )
    add("--running", type=int, metavar="COUNT", help="sequences that each old replica runs (default: half of --batch)")
    add("--plot", type=Path, metavar="FILE.png", help="draw the migration's timeline")
    add("--json", action="store_true", help="print JSON instead of tables")


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from spotjax.commands.output import print_json

    study = make_study(arguments)
    if arguments.json:
        from spotjax.commands.plan_json import as_plain

        print_json(as_plain(study))
    else:
        from rich.console import Console

        from spotjax.commands.plan_views import study_view

        console = Console()
        console.print(study_view(study))
    if arguments.plot:
        from spotjax.commands.plan_plot import plot_timeline

        plot_timeline(study, arguments.plot)
    return 0


def make_study(arguments: argparse.Namespace) -> Study:
    """Asks the planner.

    Raises:
      ConfigError: an argument is wrong.
      NoFeasibleShape: nothing fits.
    """
    from spotjax.meshes.instance_types import parse_instances
    from spotjax.meshes.shape import MeshShape
    from spotjax.planner.capacity import plan_capacity
    from spotjax.planner.demand import Demand
    from spotjax.planner.goal import Goal
    from spotjax.planner.load import Load
    from spotjax.planner.optimizer import choose_shape

    spec = model_spec(arguments.model, arguments.quantization)
    across = arguments.tensor_instances
    if across < 1:
        raise ConfigError(f"--tensor-instances must be at least 1, got {across}")
    instances = tuple(
        replace(instance, type=replace(instance.type, tensor_instances=across))
        for instance in parse_instances(arguments.instances)
    )
    if arguments.available < 0:
        raise ConfigError(f"--available must not be negative, got {arguments.available}")
    try:
        demand = Demand(batch=arguments.batch, prompt=arguments.prompt, output=arguments.output)
        load = None if arguments.rate is None else Load(arguments.rate, arguments.cv**2, arguments.service_cv**2)
        goal = Goal(
            load,
            arguments.latency_target,
            arguments.percentile,
            arguments.cost_ceiling,
            loss_probability=arguments.loss_chance,
        )
        wanted = MeshShape.parse(arguments.mesh) if arguments.mesh else None
        source, latency = latency_source(arguments.profile, arguments.model, spec, instances)
        decision = choose_shape(spec, instances, demand, wanted, goal=goal, latency=latency)
        capacity = None
        if load is not None and wanted is None:
            offered, more = instances[0].type, arguments.available
            capacity = plan_capacity(spec, instances, demand, goal, offered, more, latency=latency)
    except ValueError as problem:
        raise ConfigError(str(problem)) from problem
    return _migrate(arguments, source, spec, instances, demand, decision, capacity)


def _migrate(
    arguments: argparse.Namespace,
    source: str,
    spec: ModelSpec,
    instances: Sequence[Instance],
    demand: Demand,
    decision: Decision,
    capacity: Capacity | None,
) -> Study:
    from spotjax.meshes.instance import Instance, InstanceState
    from spotjax.meshes.placement import Placement
    from spotjax.planner.cohorts import assign_cohorts
    from spotjax.planner.holdings import Holdings
    from spotjax.planner.matcher import match
    from spotjax.planner.migration import Links, plan_migration
    from spotjax.planner.needs import needs_of

    before = read_state(arguments.state) if arguments.state else None
    live = _typical_sequences(before, demand, arguments.running)
    names = {device.instance for device in before.devices.values()} if before else set()
    going = [Instance(n, instances[0].type, InstanceState.NOTICED) for n in sorted(names - {i.name for i in instances})]
    everybody = (*instances, *going)
    inheritance = assign_cohorts(live, decision.shape.data, demand.pages, demand.page_size)
    holdings = Holdings.of(spec, before, inheritance.cohorts, everybody)
    needs = needs_of(spec, decision.shape, decision.layers, inheritance.cohorts)
    devices = match(decision.shape, needs, decision.hosts, holdings)
    links = Links.of(everybody)
    plan = plan_migration({devices[at]: mine for at, mine in needs.items()}, holdings, links)
    kept = {
        at: (
            holdings.reusable_bytes(devices[at], mine),
            holdings.bytes_of(mine.stacks.items()),
        )
        for at, mine in needs.items()
    }
    placement = Placement(before.epoch + 1 if before else 0, decision.shape, decision.layers, devices)
    return Study(
        arguments.model, source, spec, everybody, decision, capacity, before, placement, kept, plan, links,
        sum(len(cohort.sequences) for cohort in inheritance.cohorts), len(inheritance.recomputed),
    )  # fmt: skip


def _typical_sequences(before: Placement | None, demand: Demand, running: int | None) -> dict[int, list[LiveSequence]]:
    """Sequences in the middle of a typical request."""
    from spotjax.planner.kv_cohorts import LiveSequence

    if before is None:
        return {}
    count = max(1, demand.batch // 2) if running is None else running
    pages = -(-demand.context // demand.page_size)
    return {d: [LiveSequence(n, pages, demand.context) for n in range(count)] for d in range(before.shape.data)}


def model_spec(name: str, quantization: Quantization = "none") -> ModelSpec:
    """Shapes of a preset, or of a model that can be served."""
    from spotjax.models.catalog import open_model
    from spotjax.models.presets import PRESETS
    from spotjax.models.quantized_checkpoint import quantized

    if name in PRESETS:
        return replace(PRESETS[name], quantization=quantization)
    return quantized(open_model(name).checkpoint, quantization).spec


def latency_source(
    asked: str | None, model: str, spec: ModelSpec, instances: Sequence[Instance]
) -> tuple[str, LatencyOf]:
    """Where latencies come from: as asked, else the published tables where they are of this model and these machines.

    Raises:
      ConfigError: no table is published of the model, or the file cannot be read.
    """
    from spotjax.planner.cost import Roofline
    from spotjax.planner.profile import MeasuredProfile
    from spotjax.planner.published import PublishedProfile
    from spotjax.planner.published_tables import TABLES

    alike = spec.quantization == "none" and all(instance.type.name == "g4dn.12xlarge" for instance in instances)
    fits = model in TABLES and alike
    if asked == "published" or (asked is None and fits):
        if not fits:
            raise ConfigError(f"tables are published for {', '.join(TABLES)} on g4dn.12xlarge only, not quantized")
        published = PublishedProfile(TABLES[model])
        return "SpotServe's published T4 tables", lambda _: published
    if asked in (None, "roofline"):
        return "analytic roofline", lambda kind: Roofline(spec, kind)
    try:
        measured = MeasuredProfile.from_json(Path(asked).read_text())
    except OSError as problem:
        raise ConfigError(f"the profile cannot be read: {problem}") from problem
    return f"measured: {measured.model} on {measured.hardware}", lambda _: measured


def read_state(path: Path) -> Placement:
    """The placement in the JSON of ``spotjax plan`` or ``spotjax status``.

    Raises:
      ConfigError: there is none.
    """
    import msgspec

    from spotjax.meshes.instance import DeviceRef
    from spotjax.meshes.placement import Placement
    from spotjax.meshes.shape import MeshShape, Position

    try:
        placement = msgspec.json.decode(path.read_bytes())["placement"]
        return Placement(
            placement["epoch"],
            MeshShape.parse(placement["shape"]),
            tuple((start, stop) for start, stop in placement["layers"]),
            {Position(*d["position"]): DeviceRef(d["instance"], d["index"]) for d in placement["devices"]},
        )
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise ConfigError(f"{path} holds no placement: {problem!r}; take --json of spotjax plan or status") from problem
