"""Every configuration C = (D, P, M, B) that fits the instances, with what it would do: a table. Chooses nothing.

Unlike SpotServe, tensor degrees are all divisors of the query heads and layers split unevenly, so instances that a
power of two leaves idle are used. ``tensor`` stays inside an instance unless its type lets groups span several.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from spotjax.meshes.instance import Instance, InstanceType
from spotjax.meshes.layout import LayerRanges, split_layers, tensor_degrees
from spotjax.meshes.shape import MeshShape
from spotjax.models.spec import ModelSpec
from spotjax.planner.cost import MemoryNeed, memory_need
from spotjax.planner.demand import Demand
from spotjax.planner.goal import Goal
from spotjax.planner.latency import LatencyModel, Work, prefill_seconds, stages_of, step_seconds
from spotjax.planner.load import Floats, queueing_seconds, waiting_percentile

LatencyOf = Callable[[InstanceType], LatencyModel]
"""Latencies of the model on a kind of instance."""


@dataclass(frozen=True, eq=False)
class Hosts:
    """Instances that may carry a mesh of one tensor degree, those with the cheapest places first.

    Attributes:
      instances: in that order.
      span: instances that a group of M devices takes; all hosts are of one type if it is more than one.
      parts: groups of M / span devices that they and those before them offer.
      price: USD per hour that they and those before them cost.
    """

    instances: tuple[Instance, ...]
    span: int
    parts: NDArray[np.int64]
    price: Floats

    @classmethod
    def of(cls, instances: Iterable[Instance], tensor: int, span: int) -> Hosts:
        """Sorts them by price."""
        width = tensor // span
        able = sorted(instances, key=lambda host: host.price / (host.type.devices // width))
        parts = np.cumsum([host.type.devices // width for host in able], dtype=np.int64)
        return cls(tuple(able), span, parts, np.cumsum([host.price for host in able], dtype=np.float64))

    @property
    def places(self) -> int:
        """Groups of M devices that all of them offer."""
        return int(self.parts[-1]) // self.span


@dataclass(frozen=True, slots=True)
class Option:
    """A pipeline that fits: P, M and B on the instances that are at least so fast.

    Attributes:
      layers: decoder layers of every stage.
      tensor: M.
      batch: B.
      hosts: instances that may carry it.
      replicas: the numbers D of replicas for which these hosts are the fastest that are enough.
      step: seconds between two tokens of a sequence at full batch.
      service: seconds of a typical request once it runs, at full batch.
      memory: bytes on the device that needs the most.
    """

    layers: LayerRanges
    tensor: int
    batch: int
    hosts: Hosts
    replicas: range
    step: float
    service: float
    memory: MemoryNeed


class Options:
    """The table: one row for every option and number of replicas.

    Attributes:
      options: by number.
      option: number of each row's option.
      data, stage, tensor, batch: D, P, M, B.
      tokens: tokens per second that are decoded at full batch.
      rate: phi, requests per second that can be served.
      service: seconds of a typical request once it runs.
      seconds: the same with the wait for its turn, on average; infinite under overload. Equal to ``service`` if no
        load is given.
      percentile_seconds: the same for the goal's percentile, with the same time of service for all.
      cost: USD per hour of the instances in use.
      instances: number of instances in use.
      expected_rate: requests per second expected to be served if an instance goes with the goal's probability.
    """

    def __init__(self, options: Sequence[Option], goal: Goal) -> None:
        self.options = options
        counts = [len(option.replicas) for option in options]

        def column(values: Sequence[float]) -> Floats:
            return np.repeat(np.array(values, dtype=np.float64), counts)

        self.option: NDArray[np.int64] = np.repeat(np.arange(len(options)), counts)
        self.data = np.concatenate([[0.0][:0], *(np.array(option.replicas, dtype=np.float64) for option in options)])
        self.stage = column([len(option.layers) for option in options])
        self.tensor = column([option.tensor for option in options])
        self.batch = column([option.batch for option in options])
        self.service = column([option.service for option in options])
        self.tokens = self.data * self.batch / column([option.step for option in options])
        servers = self.data * self.batch
        self.rate = servers / self.service
        self.seconds = self.percentile_seconds = self.service
        if goal.load is not None:
            self.seconds = self.service + queueing_seconds(goal.load, servers, self.service)
            waiting = waiting_percentile(goal.load, servers, self.service, goal.percentile)
            self.percentile_seconds = self.service + waiting
        spent = [_spent(option) for option in options]
        self.cost = np.concatenate([[0.0][:0], *(cost for cost, _, _ in spent)])
        self.instances = np.concatenate([[0.0][:0], *(used for _, used, _ in spent)])
        lost = np.concatenate([[0.0][:0], *(lost for _, _, lost in spent)])
        asked = np.inf if goal.load is None else goal.load.rate
        after = np.minimum(self.rate * (1 - lost / self.data), asked)
        chance = goal.loss_probability
        self.expected_rate = (1 - chance) * np.minimum(self.rate, asked) + chance * after

    def __len__(self) -> int:
        return len(self.option)

    def shape(self, row: int) -> MeshShape:
        """D x P x M of a row."""
        return MeshShape(int(self.data[row]), int(self.stage[row]), int(self.tensor[row]))


def options(
    spec: ModelSpec, ready: Sequence[Instance], demand: Demand, batches: Sequence[int], latency: LatencyOf
) -> Iterator[Option]:
    """Every option, once for each kind of instance that could be the slowest of those that carry it."""
    kinds = tuple(dict.fromkeys(instance.type for instance in ready))
    models = {kind: latency(kind) for kind in kinds}
    hosts_of: dict[tuple[int, frozenset[InstanceType]], Hosts] = {}
    for tensor in tensor_degrees(spec, max((kind.devices * kind.tensor_instances for kind in kinds), default=0)):
        for stages in range(1, min(spec.config.layers, places_offered(ready, tensor)) + 1):
            layers, one = split_layers(spec.config.layers, stages), MeshShape(1, stages, tensor)
            for batch in batches:
                memory = memory_need(spec, one, layers, replace(demand, batch=batch))
                fitting = [kind for kind in kinds if kind.span(tensor) and kind.memory_bytes >= memory.total]
                steps = {kind: step_seconds(models[kind], one, layers, batch, demand.context) for kind in fitting}
                fitting = sorted((k for k in fitting if steps[k] < np.inf), key=lambda kind: (steps[kind], kind.name))
                for together in _carriers(fitting, tensor):
                    counted = 0
                    for slowest in together:
                        fast = frozenset(kind for kind in together if steps[kind] <= steps[slowest])
                        if (tensor, fast) not in hosts_of:
                            able = (instance for instance in ready if instance.type in fast)
                            hosts_of[tensor, fast] = Hosts.of(able, tensor, slowest.span(tensor))
                        hosts = hosts_of[tensor, fast]
                        replicas = hosts.places // stages
                        if replicas > counted:
                            step, reach = steps[slowest], range(counted + 1, replicas + 1)
                            service = service_seconds(models[slowest], one, layers, batch, demand, step)
                            yield Option(layers, tensor, batch, hosts, reach, step, service, memory)
                            counted = replicas


def _carriers(kinds: Sequence[InstanceType], tensor: int) -> list[list[InstanceType]]:
    """Kinds that may carry a mesh together: those with whole groups in an instance; each other one by itself."""
    inside = [kind for kind in kinds if kind.span(tensor) == 1]
    return [inside, *([kind] for kind in kinds if kind.span(tensor) > 1)]


def places_offered(instances: Sequence[Instance], tensor: int) -> int:
    """How many disjoint groups of ``tensor`` devices the instances offer, across instances where their type says so."""
    counts = Counter(instance.type for instance in instances)
    return sum(_places_of(kind, count, tensor) for kind, count in counts.items())


def _places_of(kind: InstanceType, count: int, tensor: int) -> int:
    span = kind.span(tensor)
    return count // span if span > 1 else count * (kind.devices // tensor)


def service_seconds(
    model: LatencyModel, one: MeshShape, layers: LayerRanges, batch: int, demand: Demand, step: float
) -> float:
    """A request once it runs: its own prompt, its tokens, and the prompts of the others, which come between.

    Args:
      model: seconds of single stages.
      one, layers: the replica's pipeline.
      batch: sequences that decode at once.
      demand: typical requests.
      step: seconds between two tokens of a sequence.
    """
    work = Work.prefill(demand.prompt)
    slowest = max(model.stage_seconds(stage, one.tensor, work) for stage in stages_of(layers))
    return prefill_seconds(model, one, layers, demand.prompt) + (batch - 1) * slowest + demand.output * step


def _spent(option: Option) -> tuple[Floats, Floats, Floats]:
    """For each number of replicas: USD per hour, instances, and replicas that the loss of one instance takes along.

    Places are filled in order of the hosts; a replica is lost with any of the instances that it stands on, and each
    instance in use is as likely to go.
    """
    parts = len(option.layers) * option.hosts.span
    replica = np.arange(option.replicas.stop - 1)
    first = np.searchsorted(option.hosts.parts, replica * parts, side="right")
    last = np.searchsorted(option.hosts.parts, (replica + 1) * parts - 1, side="right")
    touched = np.cumsum(last - first + 1)[option.replicas.start - 1 :]
    end = last[option.replicas.start - 1 :]
    used = end.astype(np.float64) + 1
    return option.hosts.price[end], used, touched / used
