"""Every setting of a server, in which mode it has a meaning, and which mode the settings come to.

Where they come from is in ``spotjax.settings``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args, get_type_hints

import msgspec
from msgspec import Meta

from spotjax.errors import ConfigError

ADDRESS = r"(\[[0-9A-Fa-f:.%]+\]|[^:\[\]\s]+):\d{1,5}"
HOST = r"(\[[0-9A-Fa-f:.%]+\]|[^:\[\]\s]+)"
DOMAIN = r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?"
MESH = r"(auto|[1-9]\d*x[1-9]\d*x[1-9]\d*)"
NAME = r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
NOTICES = r"(auto|none|(gce|tpu|aws|azure)(,(gce|tpu|aws|azure))*)"
DEFAULT_LISTEN = "127.0.0.1:8470"
DEFAULT_INSTANCES = 4
TLS = ("tls_certificate", "tls_key", "tls_authority")

Mode = Literal["embedded", "controller", "worker"]

# Where a setting has a meaning. "workers" is a controller that starts workers on its own machine; they get the setting.
SERVING = {"where": ("embedded", "controller")}
EMBEDDED = {"where": ("embedded",)}
CONTROLLER = {"where": ("controller",)}
WORKER = {"where": ("worker",)}
FLEET = {"where": ("controller", "worker")}
MACHINE = {"where": ("embedded", "worker", "workers")}
WORKERS = {"where": ("worker", "workers")}
EVERYWHERE = {"where": ("embedded", "controller", "worker")}
SHOWN = {
    ("embedded",): "for embedded mode",
    ("controller",): "for a controller",
    ("worker",): "for a worker",
    ("controller", "worker"): "for fleet mode",
    ("embedded", "controller"): "not for a worker",
    ("worker", "workers"): "for workers",
    ("embedded", "worker", "workers"): "not for a controller without workers of its own",
    ("embedded", "controller", "worker"): "",
}
"""What help says of them."""


class ServeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of a server. ``spotjax.settings.load`` checks them."""

    model: Annotated[
        str,
        Meta(
            min_length=1,
            description="tiny, the name of a fetched model, a directory, a .gguf file or hf://org/name",
            extra=SERVING,
        ),
    ] = "tiny"
    listen: Annotated[
        str,
        Meta(
            pattern=f"^({ADDRESS})?$",
            description="HOST:PORT to serve gRPC on; port 0 takes a free one; without --instances, wait for workers "
            f"there; empty: {DEFAULT_LISTEN}",
            extra=SERVING,
        ),
    ] = ""
    http: Annotated[
        str,
        Meta(
            pattern=f"^(off|{ADDRESS})$",
            description="HOST:PORT to serve HTTP on, OpenAI's interface among it; port 0 takes a free one; off: none",
            extra=SERVING,
        ),
    ] = "127.0.0.1:8471"
    http_names: Annotated[
        str,
        Meta(
            pattern=f"^({DOMAIN}(,{DOMAIN})*)?$",
            description="names, with commas between them, under which HTTP is reached, besides addresses and names of "
            "this network: others are refused where there are no API keys",
            extra=SERVING,
        ),
    ] = ""
    join: Annotated[
        str,
        Meta(pattern=f"^({ADDRESS})?$", description="HOST:PORT of the controller to work for", extra=WORKER),
    ] = ""
    workers: Annotated[
        int,
        Meta(
            ge=0, le=1024, description="workers to start on this machine, as processes of their own", extra=CONTROLLER
        ),
    ] = 0
    name: Annotated[
        str,
        Meta(
            pattern=f"^({NAME})?$",
            description="of this instance, unique in the fleet; empty: made from the host's name",
            extra=WORKER,
        ),
    ] = ""
    instances: Annotated[
        int,
        Meta(
            ge=0,
            description=f"instances that the local devices are divided into, in one process; 0: {DEFAULT_INSTANCES}",
            extra=EMBEDDED,
        ),
    ] = 0
    devices_per_instance: Annotated[int, Meta(ge=1, description="devices of each instance", extra=MACHINE)] = 2
    mesh: Annotated[
        str,
        Meta(
            pattern=f"^{MESH}$",
            description="DATAxSTAGExTENSOR such as 2x2x1; auto lets the planner choose",
            extra=SERVING,
        ),
    ] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Meta(description="of parameters and KV; auto: float32 on CPU, bfloat16 on accelerators", extra=SERVING),
    ] = "auto"
    quantization: Annotated[
        Literal["none", "int8"],
        Meta(
            description="of the model's matrices on devices: int8, with a scale for each output channel; or none",
            extra=SERVING,
        ),
    ] = "none"
    max_model_len: Annotated[
        int,
        Meta(
            ge=0,
            description="positions for prompt and output; 0: the model's own limit, at most 4096",
            extra=SERVING,
        ),
    ] = 0
    max_batch: Annotated[int, Meta(ge=1, description="sequences decoded at once by one replica", extra=SERVING)] = 32
    prefill_tokens: Annotated[int, Meta(ge=1, description="token budget of one prefill step", extra=SERVING)] = 256
    page_size: Annotated[int, Meta(ge=1, description="token positions in one page of KV", extra=SERVING)] = 16
    kv_pages: Annotated[
        int,
        Meta(
            ge=0,
            description="pages of KV in one replica; 0: room for max_batch sequences of 512 positions",
            extra=SERVING,
        ),
    ] = 0
    prefix_cache: Annotated[
        bool,
        Meta(description="keep KV of prompts and outputs for later ones that begin alike", extra=SERVING),
    ] = True
    queue_limit: Annotated[
        int, Meta(ge=1, description="waiting requests from which on new ones are refused", extra=SERVING)
    ] = 1024
    retain_seconds: Annotated[
        float, Meta(ge=0, description="how long a finished request can be resumed", extra=SERVING)
    ] = 600.0
    durability: Annotated[
        Literal["step", "interval", "none"],
        Meta(
            description="when a token may be sent: step, once it is on disk; interval, once it is written, to be on "
            "disk within a second; none, at once, and requests end with this process",
            extra=SERVING,
        ),
    ] = "step"
    commit_log: Annotated[
        str,
        Meta(
            description="directory of the requests and their tokens, which a server started again goes on with; empty: "
            "one named after the address, in the user's state directory",
            extra=SERVING,
        ),
    ] = ""
    capacity: Annotated[
        str,
        Meta(
            description="TOML file that says who rents machines out and how many may be: the controller buys its own "
            "capacity; empty: it buys none",
            extra=CONTROLLER,
        ),
    ] = ""
    checkpoint: Annotated[
        str,
        Meta(
            description="directory or bucket URL that all workers reach: KV goes there when the whole fleet is to be "
            "taken, and is read from there when a fleet starts again; empty: nowhere",
            extra=CONTROLLER,
        ),
    ] = ""
    drain_seconds: Annotated[
        float, Meta(ge=0, description="how long running requests may go on after SIGTERM or Ctrl-C", extra=SERVING)
    ] = 30.0
    instance_memory_bytes: Annotated[
        int,
        Meta(
            ge=0,
            description="memory of one instance's devices together; 0: what the devices report, on virtual devices so "
            "much that the model needs several of them",
            extra=MACHINE,
        ),
    ] = 0
    attention: Annotated[
        Literal["auto", "xla", "tpu", "gpu"],
        Meta(
            description="what computes attention: the kernels for TPUs or GPUs that come with jax, or plain XLA; auto: "
            "those of the platform where they can serve the model",
            extra=MACHINE,
        ),
    ] = "auto"
    cpu_kernels: Annotated[
        Literal["auto", "native", "xla"],
        Meta(
            description="what computes products and attention on CPUs: kernels that are compiled on "
            "this machine by its C++ compiler, or plain XLA; auto: the kernels where there is a compiler",
            extra=MACHINE,
        ),
    ] = "auto"
    fuse: Annotated[bool, Meta(description="compile whole stages in the background", extra=SERVING)] = True
    compilation_cache: Annotated[
        str,
        Meta(
            description="directory for compiled programs; empty: one in the user's cache directory; off: none",
            extra=MACHINE,
        ),
    ] = ""
    parameter_store: Annotated[
        str,
        Meta(
            description="directory in which parameters outlive a worker's process; empty: in shared memory; off: none",
            extra=WORKERS,
        ),
    ] = ""
    read_bandwidth: Annotated[
        int,
        Meta(
            ge=0,
            description="bytes per second at which a worker reads parameters from the model or checkpoint at most, for "
            "storage that many share; 0: no limit",
            extra=WORKERS,
        ),
    ] = 0
    data_listen: Annotated[
        str,
        Meta(
            pattern=f"^{ADDRESS}$",
            description="HOST:PORT for activations, parameters and KV of other processes; port 0 takes a free one",
            extra=FLEET,
        ),
    ] = "127.0.0.1:0"
    advertise: Annotated[
        str,
        Meta(
            pattern=f"^({HOST})?$",
            description="host at which others reach --data-listen; empty: its own",
            extra=FLEET,
        ),
    ] = ""
    lease_seconds: Annotated[
        float, Meta(ge=0.2, le=60, description="silence after which a worker counts as lost", extra=CONTROLLER)
    ] = 2.0
    grace_seconds: Annotated[
        float,
        Meta(
            ge=0,
            le=3600,
            description="how long a worker's machine still lives after SIGTERM: its notice to the fleet",
            extra=WORKERS,
        ),
    ] = 25.0
    notices: Annotated[
        str,
        Meta(
            pattern=f"^{NOTICES}$",
            description="whose notices of this machine's end to listen to, beside signals: auto, the cloud that it is "
            "on; none; or some of gce, tpu, aws, azure with commas between them",
            extra=MACHINE,
        ),
    ] = "auto"
    notice_seconds: Annotated[
        float,
        Meta(
            ge=1,
            le=3600,
            description="from a preemption notice of Compute Engine, which does not say when, to the machine's end, "
            "less a few: 115 for a VM that was made with a notice of 120 s",
            extra=MACHINE,
        ),
    ] = 25.0
    notice_file: Annotated[
        str,
        Meta(
            description="file that notices are written to, one line such as preempt 30, maintenance 600 or rebalance; "
            "empty: none",
            extra=MACHINE,
        ),
    ] = ""
    notice_command: Annotated[
        str,
        Meta(
            description="command that writes such lines to standard output, run without a shell, again and again; "
            "empty: none",
            extra=MACHINE,
        ),
    ] = ""
    acknowledge_notices: Annotated[
        bool,
        Meta(
            description="tell the cloud that it may take the machine once the fleet has left it, where it can be told "
            "(Azure); only where the machine is this worker's alone",
            extra=WORKER,
        ),
    ] = False
    metadata_url: Annotated[
        str,
        Meta(
            pattern=r"^(https?://[^/\s]+)?$",
            description="where the cloud's metadata server is; empty: http://169.254.169.254",
            extra=MACHINE,
        ),
    ] = ""
    abandoned_seconds: Annotated[
        float,
        Meta(
            ge=0,
            le=604_800,
            description="after which a worker that is part of no fleet ends by itself, because its controller is gone "
            "for good; 0: it tries to join for ever",
            extra=WORKER,
        ),
    ] = 0.0
    leave: Annotated[
        Literal["early", "late"],
        Meta(
            description="when the mesh leaves an instance that has notice: early, as soon as parameters and KV are "
            "copied; late, at the last token boundary that fits before its deadline",
            extra=SERVING,
        ),
    ] = "early"
    recovery: Annotated[
        Literal["spotjax", "reparallelization", "rerouting"],
        Meta(
            description="what happens when instances change; for comparison only: reparallelization, everything stops "
            "and loads again; rerouting, replicas of a fixed shape close and open",
            extra=SERVING,
        ),
    ] = "spotjax"
    kv_backup: Annotated[
        bool,
        Meta(
            description="copy finished KV to another instance's host memory, for losses without notice",
            extra=CONTROLLER,
        ),
    ] = True
    kv_backup_bandwidth: Annotated[
        int,
        Meta(ge=0, description="bytes per second that each worker may spend on that; 0: no limit", extra=CONTROLLER),
    ] = 100_000_000
    slice_hosts: Annotated[
        int,
        Meta(ge=1, le=4096, description="host processes that are this instance together: a TPU slice", extra=WORKER),
    ] = 1
    slice_host: Annotated[
        int, Meta(ge=0, description="which of them this one is; 0 speaks for the slice", extra=WORKER)
    ] = 0
    slice_coordinator: Annotated[
        str,
        Meta(
            pattern=f"^({ADDRESS})?$",
            description="HOST:PORT at which host 0 of a slice brings its hosts together, for these alone to reach; "
            "empty: a TPU slice finds it, and the hosts' numbers, by itself",
            extra=WORKER,
        ),
    ] = ""
    price_class: Annotated[
        Literal["spot", "on_demand"], Meta(description="whether the machine can be taken away", extra=WORKER)
    ] = "spot"
    zone: Annotated[
        str, Meta(pattern=f"^({NAME})?$", description="where the machine is, such as europe-west4-a", extra=WORKER)
    ] = ""
    api_keys: Annotated[
        str,
        Meta(
            description="file of API keys that spotjax keys makes: who may call, what they may do and how much; empty: "
            "everybody who can connect may do everything",
            extra=SERVING,
        ),
    ] = ""
    join_token: Annotated[
        str,
        Meta(
            description="file with the token that spotjax keys join-token makes, the same for the controller and all "
            "workers: nobody joins or reads their data without; empty: none",
            extra=FLEET,
        ),
    ] = ""
    tls_certificate: Annotated[
        str, Meta(description="PEM file with this process's certificate: TLS on all connections", extra=EVERYWHERE)
    ] = ""
    tls_key: Annotated[str, Meta(description="PEM file with its private key", extra=EVERYWHERE)] = ""
    tls_authority: Annotated[
        str,
        Meta(
            description="PEM file with the authority that signed everybody's certificates: mutual TLS; only a server "
            "without workers does without",
            extra=EVERYWHERE,
        ),
    ] = ""
    client_certificates: Annotated[
        bool,
        Meta(
            description="with tls_authority, take only clients with a certificate of it; workers always need one for "
            "the data that they exchange",
            extra=SERVING,
        ),
    ] = True
    insecure: Annotated[
        bool,
        Meta(
            description="listen where others can connect even if they need neither keys, tokens nor certificates",
            extra=EVERYWHERE,
        ),
    ] = False
    traces: Annotated[
        str,
        Meta(
            pattern=r"^(https?://[^/\s]+)?$",
            description="http://HOST:PORT, or https://, that spans of requests and migrations are sent to by OTLP over "
            "gRPC; needs the extra otel; empty: nowhere",
            extra=SERVING,
        ),
    ] = ""
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Meta(description="least severity that is logged", extra=EVERYWHERE),
    ] = "info"
    log_format: Annotated[
        Literal["text", "json"],
        Meta(description="log lines for people or for machines, on standard error", extra=EVERYWHERE),
    ] = "text"

    @property
    def address(self) -> str:
        """Where gRPC is served."""
        return self.listen or DEFAULT_LISTEN

    @property
    def embedded_instances(self) -> int:
        """Instances of embedded mode."""
        return self.instances or DEFAULT_INSTANCES


TYPES: dict[str, Any] = get_type_hints(ServeConfig, include_extras=True)


def mode(config: ServeConfig) -> Mode:
    """What the process is: an embedded server, the controller of a fleet, or a worker of one."""
    if config.join:
        return "worker"
    if config.workers or (config.listen and not config.instances):
        return "controller"
    return "embedded"


def refuse_contradictions(config: ServeConfig) -> None:
    """Raises ConfigError for settings that are not at their defaults, but have no meaning beside the others.

    The message names both. A setting at its default changes nothing, so it passes.
    """
    chosen = mode(config)
    cause = f"workers ({config.workers})" if config.workers else f"listen ({config.listen}) without instances"
    reason = {
        "worker": f"beside join ({config.join}), which makes this a worker",
        "controller": f"beside {cause}, which makes this a controller",
        "embedded": "in an embedded server; join or workers, or listen without instances, would make it a fleet's",
    }[chosen]
    roles = {chosen, "workers"} if config.workers else {chosen}
    for setting in msgspec.structs.fields(ServeConfig):
        value, where = getattr(config, setting.name), where_of(setting.name)
        if value != setting.default and not roles.intersection(where):
            raise ConfigError(f"{setting.name} ({value}) has no meaning {reason}; it is {SHOWN[where]}")
    needed = TLS[:2] if chosen == "embedded" else TLS
    if any(getattr(config, name) for name in TLS) and (missing := [n for n in needed if not getattr(config, n)]):
        there = [name for name in TLS if getattr(config, name)]
        raise ConfigError(f"{' and '.join(there)} without {' and '.join(missing)}: TLS needs {', '.join(needed)}")
    if not config.client_certificates and not config.tls_authority:
        raise ConfigError("client_certificates is off, which has no meaning without tls_authority")
    if config.listen.endswith(":0") and config.durability != "none" and not config.commit_log:
        raise ConfigError(
            f"listen ({config.listen}) is another port at every start, so a commit log cannot be named after it: give "
            "commit_log a directory, or durability none"
        )
    if config.recovery != "spotjax" and (config.checkpoint or config.leave != "early"):
        name = "checkpoint" if config.checkpoint else "leave"
        raise ConfigError(
            f"{name} ({getattr(config, name)}) has no meaning with recovery {config.recovery}, which keeps no KV"
        )
    if config.capacity and (config.workers or config.durability == "none"):
        name = "workers" if config.workers else "durability"
        reason = "it starts them itself" if config.workers else "what was spent is kept beside the commit log"
        raise ConfigError(f"capacity ({config.capacity}) does not go with {name} ({getattr(config, name)}): {reason}")
    if config.commit_log and config.durability == "none":
        raise ConfigError(f"commit_log ({config.commit_log}) has no meaning with durability none, which keeps no log")
    if config.slice_host >= config.slice_hosts:
        raise ConfigError(f"slice_host ({config.slice_host}) must be less than slice_hosts ({config.slice_hosts})")
    if config.slice_coordinator and config.slice_hosts == 1:
        raise ConfigError(f"slice_coordinator ({config.slice_coordinator}) has no meaning without slice_hosts")
    if chosen == "worker" and not config.advertise and is_any(config.data_listen):
        raise ConfigError(
            f"data_listen ({config.data_listen}) is every address of this machine; advertise must say which one of "
            "them the others can reach"
        )


def where_of(name: str) -> tuple[str, ...]:
    """The modes in which a setting has a meaning."""
    meta = get_args(TYPES[name])[1]
    return tuple(meta.extra["where"])


def is_any(address: str) -> bool:
    """Whether ``HOST:PORT`` means all of a machine's addresses."""
    return address.rpartition(":")[0] in ("0.0.0.0", "[::]")
