"""Every metric that a server shows: its name, what it means, its unit, labels and buckets. Nothing else names one.

Labels have few values: workers and replicas that there are, sources of notices, and words of the program. Where the
values come from is in ``recorder`` (what happens) and ``collector`` (what is). See docs/monitoring.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PREFIX = "spotjax_"
Kind = Literal["counter", "gauge", "histogram", "summary"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric.

    Attributes:
      name: as it is scraped; a counter's ends in ``_total``.
      kind: of metric.
      help: what it means, one sentence.
      labels: names of its labels.
      buckets: upper bounds of a histogram's buckets.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def samples(self) -> tuple[str, ...]:
        """Names under which its values are found in queries."""
        suffixes = {"histogram": ("_bucket", "_sum", "_count"), "summary": ("_sum", "_count")}.get(self.kind, ("",))
        return tuple(self.name + suffix for suffix in suffixes)

    @property
    def unit(self) -> str:
        """As OpenMetrics has it: the last word of its name, without ``_total``, if it is a unit."""
        word = self.name.removesuffix("_total").rpartition("_")[2]
        return word if word in UNITS else ""


UNITS = ("seconds", "bytes", "ratio", "tokens", "usd")
ALL: dict[str, Metric] = {}


def _metric(name: str, kind: Kind, help: str, *labels: str, buckets: tuple[float, ...] = ()) -> Metric:
    metric = Metric(PREFIX + name, kind, help, labels, buckets)
    ALL[metric.name] = metric
    return metric


FIRST_TOKEN = (
    0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
)  # fmt: skip
BETWEEN_TOKENS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
WHOLE = (0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0)
QUEUE = (0.001, 0.005, 0.01, 0.05, 0.1, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0)
STEP = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.0, 2.0, 4.0)
COMMIT = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)
MIGRATION = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0)

# -- the server

INFO = _metric("build_info", "gauge", "1, with the version and the name of the served model.", "version", "model")
READY = _metric("ready", "gauge", "1 while requests are served and new ones taken.")
DRAINING = _metric("draining", "gauge", "1 while no new requests are taken because the server is about to end.")

# -- requests; a request with n choices counts n times

RUNNING = _metric("requests_running", "gauge", "Sequences that replicas have taken up.")
WAITING = _metric("requests_waiting", "gauge", "Sequences that are accepted and wait to be taken up.")
SUCCESS = _metric("request_success_total", "counter", "Sequences that ended, by finish reason.", "finish")
PROMPT_TOKENS = _metric("prompt_tokens_total", "counter", "Prompt tokens of the sequences that were taken up.")
GENERATION_TOKENS = _metric("generation_tokens_total", "counter", "Output tokens that were committed.")
QUEUE_TIME = _metric(
    "request_queue_time_seconds", "histogram", "From a request's arrival to a replica taking it up.", buckets=QUEUE
)
TTFT = _metric(
    "time_to_first_token_seconds", "histogram", "From a request's arrival to its first committed token.",
    buckets=FIRST_TOKEN,
)  # fmt: skip
INTER_TOKEN = _metric(
    "inter_token_latency_seconds", "histogram", "Between two committed tokens of a sequence, pauses included.",
    buckets=BETWEEN_TOKENS,
)  # fmt: skip
E2E = _metric(
    "e2e_request_latency_seconds", "histogram",
    "From a request's arrival to its end, of those that ended by stop or length.", buckets=WHOLE,
)  # fmt: skip

# -- the engine

KV_USAGE = _metric("kv_cache_usage_ratio", "gauge", "KV pages that running sequences need, of all.", "replica")
KV_PAGES = _metric(
    "kv_cache_pages", "gauge", "KV pages: used, kept for prompts that begin alike (cached), or free.",
    "replica", "state",
)  # fmt: skip
PREFIX_QUERIES = _metric(
    "prefix_cache_queries_total", "counter", "Tokens of the sequences for which the prefix cache was asked."
)
PREFIX_HITS = _metric("prefix_cache_hits_total", "counter", "Of these, tokens whose KV was in it.")
PREEMPTED = _metric(
    "requests_preempted_total", "counter", "Times that a sequence went back to the queue for lack of KV pages."
)
STEP_TIME = _metric("step_seconds", "histogram", "Steps by kind: prefill or decode.", "kind", buckets=STEP)
COMMIT_TIME = _metric(
    "commit_seconds", "histogram", "From a step's result to the moment that the commit log has it.", buckets=COMMIT
)
LOG_PROBLEM = _metric(
    "commit_log_problem", "gauge", "1 while the commit log cannot be written: nothing is accepted, streams wait."
)

# -- the fleet

EPOCH = _metric("epoch", "gauge", "Epoch of the last mesh.")
MESH = _metric(
    "mesh_degree", "gauge", "Shape of the mesh, by axis: data, stage, tensor; 0 while there is none.", "axis"
)
INSTANCES = _metric("instances", "gauge", "Instances by state and by what they were rented as.", "state", "price_class")
NOTICES = _metric(
    "preemption_notices_total", "counter", "Instances that were said to be taken away, by who said so.", "source"
)
NOTICES_WITHDRAWN = _metric("preemption_notices_withdrawn_total", "counter", "Of these, taken back.", "source")
MIGRATIONS = _metric(
    "migrations_total", "counter", "Changes of the mesh, by what led to them and what came of them.", "path", "outcome"
)
MIGRATION_TIME = _metric(
    "migration_seconds", "histogram", "From a change's beginning to the new mesh.", buckets=MIGRATION
)
MIGRATION_PAUSE = _metric(
    "migration_pause_seconds", "histogram", "Of that, the time in which the replicas concerned did not decode.",
    buckets=MIGRATION,
)  # fmt: skip
MIGRATION_BYTES = _metric(
    "migration_bytes_total", "counter",
    "Bytes that changes brought into place, from an instance or the checkpoint: parameters or kv.", "source", "content",
)  # fmt: skip
RECOMPUTED = _metric(
    "tokens_recomputed_total", "counter", "Positions whose KV was computed again after it had been lost or given up."
)
RESUMED = _metric(
    "requests_resumed_total", "counter", "Sequences that were stopped by a change of the mesh and went on after it."
)

# -- cost, of a controller that rents its machines

COST = _metric("cost_usd_total", "counter", "What all machines have cost at most, ever, also before this process.")
COST_RATE = _metric("cost_usd_per_hour", "gauge", "What all machines that may exist cost now.")
ON_DEMAND_RATE = _metric("on_demand_usd_per_hour", "gauge", "What the same machines would cost on demand.")
WANTED = _metric("instances_wanted", "gauge", "Instances that the controller wants to have.")

# -- what each worker says of itself

STAGE_TIME = _metric(
    "worker_step_seconds", "summary", "Steps on a stage, from dispatch to result.", "worker", "replica", "stage"
)
SENT = _metric(
    "worker_sent_bytes_total", "counter", "Bytes sent to other processes of the fleet, bulk reads included.",
    "worker",
)  # fmt: skip
RECEIVED = _metric("worker_received_bytes_total", "counter", "The same, received.", "worker")
MOVED = _metric(
    "worker_migrated_bytes_total", "counter", "Bytes that changes of the mesh brought here, by source.",
    "worker", "source",
)  # fmt: skip
BACKUP = _metric("worker_kv_backup_bytes", "gauge", "Host memory that copies of others' KV take.", "worker")
DEVICE_USED = _metric(
    "worker_device_memory_used_bytes", "gauge", "Of each device, where the backend tells.", "worker", "device"
)
DEVICE_LIMIT = _metric(
    "worker_device_memory_limit_bytes", "gauge", "That the backend may use of it.", "worker", "device"
)
RESIDENT = _metric("worker_resident_memory_bytes", "gauge", "Host memory of the worker process.", "worker")
CPU = _metric("worker_cpu_seconds_total", "counter", "Processor time of the worker process.", "worker")
COMPILED = _metric(
    "worker_compiled_total", "counter", "Functions that were compiled while somebody could have waited.", "worker"
)
HEARTBEAT_AGE = _metric(
    "worker_heartbeat_age_seconds", "gauge", "Since the last sign of life that the controller has had.", "worker"
)
