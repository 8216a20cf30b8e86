"""What the manifests say goes together: with each other, and with the program that they start."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import pytest
from kubernetes_cases import DEPLOYMENTS, IMAGE, Manifest, applied, container_of, deployment, of_kind, pods, selects

from spotjax import cli, settings
from spotjax.bootstrap.kubernetes.clusters import CLUSTERS
from spotjax.bootstrap.kubernetes.configuration import DATA_PORT, GRPC_PORT, HTTP_PORT
from spotjax.bootstrap.kubernetes.manifests import render
from spotjax.bootstrap.kubernetes.options import KubernetesOptions
from spotjax.bootstrap.kubernetes.pods import USER
from spotjax.bootstrap.kubernetes.termination import SLACK_SECONDS
from spotjax.config import ServeConfig, mode
from spotjax.errors import ConfigError
from spotjax.serve import FLUSH_SECONDS
from spotjax.worker.process import CANCEL_SECONDS

each = pytest.mark.parametrize("name", DEPLOYMENTS)
PARSER = cli.parser()
POD_IP, ZONE = "10.1.2.3", "europe-west4-a"


def environment_of(manifest: Manifest, template: Manifest, ordinal: int = 0) -> dict[str, str]:
    """The variables that the kubelet gives the container of a pod."""
    name = f"{manifest['metadata']['name']}-{ordinal}"
    fields = {
        "metadata.name": name,
        "status.podIP": POD_IP,
        "metadata.labels['apps.kubernetes.io/pod-index']": str(ordinal),
        "metadata.labels['topology.kubernetes.io/zone']": ZONE,
    }
    found = {}
    for variable in container_of(template)["env"]:
        source = variable.get("valueFrom", {})
        if "secretKeyRef" not in source:
            found[variable["name"]] = fields[source["fieldRef"]["fieldPath"]] if source else variable["value"]
    return found


def files_of(manifests: list[Manifest], directory: Path) -> Path:
    """The ConfigMap as it is mounted."""
    (settings_map,) = of_kind(manifests, "ConfigMap")
    for name, text in settings_map["data"].items():
        (directory / name).write_text(text)
    return directory


def parsed(command: list[str], manifests: list[Manifest], directory: Path) -> argparse.Namespace:
    """The arguments of a ``spotjax`` command of a container, files found as they are mounted."""
    assert command[0] == "spotjax"
    files_of(manifests, directory)
    return PARSER.parse_args([word.replace("/etc/spotjax/", f"{directory}/") for word in command[1:]])


def config_of(manifest: Manifest, template: Manifest, everything: list[Manifest], directory: Path) -> ServeConfig:
    """The settings that a pod comes to, as its process reads them."""
    arguments = parsed(container_of(template)["command"], everything, directory)
    return settings.load(arguments, environment_of(manifest, template))


@each
def test_every_pod_is_started_with_settings_that_the_program_takes(name: str, tmp_path: Path) -> None:
    manifests, options = deployment(name), DEPLOYMENTS[name]
    for manifest, template in pods(manifests):
        config = config_of(manifest, template, manifests, tmp_path)
        component = template["metadata"]["labels"]["app.kubernetes.io/component"]
        assert mode(config) == component
        if component == "worker":
            assert config.advertise == POD_IP
            assert config.devices_per_instance == options.chips
            assert config.zone == ZONE
            assert config.name
        else:
            assert config.model == options.model


def test_settings_go_to_those_for_whom_they_mean_something(tmp_path: Path) -> None:
    manifests = deployment("aks")
    configs = [config_of(manifest, template, manifests, tmp_path) for manifest, template in pods(manifests)]
    controller, worker = sorted(configs, key=lambda config: mode(config))
    assert (controller.max_batch, controller.kv_backup, controller.log_level) == (8, False, "debug")
    assert (worker.attention, worker.log_level) == ("gpu", "debug")
    assert (worker.max_batch, controller.attention) == (ServeConfig().max_batch, ServeConfig().attention)


@each
def test_probes_are_commands_and_services_that_there_are(name: str, tmp_path: Path) -> None:
    manifests = deployment(name)
    for manifest, template in pods(manifests):
        container = container_of(template)
        probes = {key: container[key] for key in container if key.endswith("Probe")}
        assert "readinessProbe" in probes
        for probe in probes.values():
            if "grpc" in probe:
                assert not DEPLOYMENTS[name].tls, "probes of the kubelet know no TLS"
                assert probe["grpc"] == {"port": GRPC_PORT, "service": probe["grpc"]["service"]}
                assert probe["grpc"]["service"] in ("liveness", "readiness")
            else:
                arguments = parsed(probe["exec"]["command"], manifests, tmp_path)
                asked = settings.load(arguments, environment_of(manifest, template))
                assert asked == config_of(manifest, template, manifests, tmp_path)
                if arguments.alive:
                    assert mode(asked) == "controller"


@each
def test_a_worker_is_never_restarted_for_being_slow(name: str) -> None:
    for _, template in pods(deployment(name)):
        container = container_of(template)
        is_worker = container["name"] == "worker"
        assert ("livenessProbe" in container) == (not is_worker)


@each
def test_termination_grace_is_more_than_what_the_process_needs(name: str, tmp_path: Path) -> None:
    manifests = deployment(name)
    for manifest, template in pods(manifests):
        config = config_of(manifest, template, manifests, tmp_path)
        container = container_of(template)
        pre_stop = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        granted = template["spec"]["terminationGracePeriodSeconds"]
        if mode(config) == "worker":
            assert pre_stop == 0
            assert granted >= config.grace_seconds + CANCEL_SECONDS + 1
            assert granted <= math.ceil(
                DEPLOYMENTS[name].notice_seconds or CLUSTERS[DEPLOYMENTS[name].cluster].notice_seconds
            )
        else:
            assert pre_stop == DEPLOYMENTS[name].pre_stop_seconds
            assert granted >= pre_stop + config.drain_seconds + FLUSH_SECONDS + SLACK_SECONDS


def test_a_worker_on_gke_spot_uses_what_the_kubelet_gives() -> None:
    ordinary, longer = (
        KubernetesOptions(cluster="gke-gpu", image=IMAGE, accelerator="nvidia-l4", notice_seconds=seconds)
        for seconds in (0, 105)
    )
    assert ordinary.grace_seconds == 15 - SLACK_SECONDS
    assert longer.grace_seconds == 105 - SLACK_SECONDS


@each
def test_selectors_mean_the_pods_that_they_should(name: str) -> None:
    manifests = deployment(name)
    labels = {m["metadata"]["name"]: t["metadata"]["labels"] for m, t in pods(manifests)}
    workers = {pod for pod in labels if pod != "spotjax-controller"}
    assert len(workers) == (DEPLOYMENTS[name].workers if DEPLOYMENTS[name].hosts > 1 else 1)

    def meant(selector: Manifest) -> set[str]:
        return {pod for pod, own in labels.items() if selects(selector, own)}

    for manifest, _ in pods(manifests):
        assert meant(manifest["spec"]["selector"]) == {manifest["metadata"]["name"]}
    for service in of_kind(manifests, "Service"):
        wanted = workers if service["metadata"]["name"] == "spotjax-slices" else {"spotjax-controller"}
        assert meant({"matchLabels": service["spec"]["selector"]}) == wanted
    for budget in of_kind(manifests, "PodDisruptionBudget"):
        assert meant(budget["spec"]["selector"]) == workers


@each
def test_services_lead_to_ports_of_containers_and_workers_dial_a_service(name: str, tmp_path: Path) -> None:
    manifests = deployment(name)
    listening = {}
    for manifest, template in pods(manifests):
        config = config_of(manifest, template, manifests, tmp_path)
        ports = {port["name"]: port["containerPort"] for port in container_of(template)["ports"]}
        assert ports["data"] == int(config.data_listen.rpartition(":")[2]) == DATA_PORT
        if mode(config) == "controller":
            assert ports["grpc"] == int(config.address.rpartition(":")[2])
            assert ports["http"] == int(config.http.rpartition(":")[2])
            listening = ports
    services = {service["metadata"]["name"]: service["spec"] for service in of_kind(manifests, "Service")}
    for service, spec in services.items():
        for port in spec["ports"]:
            if service != "spotjax-slices":
                assert listening[port["targetPort"]] == port["port"]
    assert {port["port"] for port in services["spotjax"]["ports"]} == {GRPC_PORT, HTTP_PORT}, "clients get no data port"
    for manifest, template in pods(manifests):
        config = config_of(manifest, template, manifests, tmp_path)
        if config.join:
            host, _, port = config.join.rpartition(":")
            # results and heartbeats go to the data port of the same host
            assert {int(port), DATA_PORT} <= {entry["port"] for entry in services[host]["ports"]}
            assert services[host]["publishNotReadyAddresses"], "it is not ready before workers have joined"


@each
def test_only_listed_ports_are_open_and_only_to_labelled_pods(name: str) -> None:
    options, manifests = DEPLOYMENTS[name], deployment(name)
    labels = {m["metadata"]["name"]: t["metadata"]["labels"] for m, t in pods(manifests)}
    labels |= {"client": {"spotjax/client": "true"}, "stranger": {"app": "other"}}
    policies = [policy["spec"] for policy in of_kind(manifests, "NetworkPolicy")]
    assert all(policy["policyTypes"] == ["Ingress"] for policy in policies)

    def may(source: str, target: str, port: int) -> bool:
        applying = [p for p in policies if selects(p["podSelector"], labels[target])]
        assert applying, f"{target} would be open to everybody"
        return any(
            any("podSelector" in peer and selects(peer["podSelector"], labels[source]) for peer in rule["from"])
            and ("ports" not in rule or port in [entry["port"] for entry in rule["ports"]])
            for policy in applying
            for rule in policy["ingress"]
        )

    workers = [pod for pod in labels if pod not in ("spotjax-controller", "client", "stranger")]
    for worker in workers:
        assert may(worker, "spotjax-controller", GRPC_PORT) and may(worker, "spotjax-controller", DATA_PORT)
        assert may("spotjax-controller", worker, DATA_PORT) and not may("spotjax-controller", worker, 22)
        assert all(may(other, worker, DATA_PORT) for other in workers)
        assert not any(
            may(who, worker, port) for who in ("client", "stranger") for port in (DATA_PORT, GRPC_PORT, 8482)
        )
        for other in workers:
            assert may(other, worker, 8471) == (options.hosts > 1 and other == worker), "hosts of one slice alone"
    assert all(may("client", "spotjax-controller", port) for port in (GRPC_PORT, HTTP_PORT))
    assert not any(may(worker, "spotjax-controller", HTTP_PORT) for worker in workers), "nothing there is for them"
    assert not may("client", "spotjax-controller", DATA_PORT)
    assert not any(may("stranger", "spotjax-controller", port) for port in (GRPC_PORT, HTTP_PORT, DATA_PORT))


@each
def test_prometheus_finds_the_controller_s_metrics_and_no_other_pod(name: str) -> None:
    for manifest, template in pods(deployment(name)):
        told = {key: value for key, value in template["metadata"]["annotations"].items() if "prometheus.io" in key}
        ports = {port["name"]: port["containerPort"] for port in container_of(template)["ports"]}
        if "http" not in ports:
            assert not told, manifest["metadata"]["name"]
            continue
        scheme = "https" if "certificates" in [v["name"] for v in template["spec"]["volumes"]] else "http"
        assert told == {
            "prometheus.io/scrape": "true", "prometheus.io/port": str(ports["http"]), "prometheus.io/path": "/metrics",
            "prometheus.io/scheme": scheme,
        }  # fmt: skip


@each
def test_what_the_program_writes_is_on_a_volume(name: str, tmp_path: Path) -> None:
    manifests = deployment(name)
    for manifest, template in pods(manifests):
        config = config_of(manifest, template, manifests, tmp_path)
        container, volumes = container_of(template), {v["name"]: v for v in template["spec"]["volumes"]}
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        assert {mount["name"] for mount in mounts.values()} == set(volumes)
        env = environment_of(manifest, template)
        written = [env["SPOTJAX_CACHE"], env["HOME"], "/tmp"]
        written += [config.commit_log] if config.commit_log else ["/dev/shm"]
        for path in written:
            above = next(parent for parent in (Path(path), *Path(path).parents) if str(parent) in mounts)
            assert str(above) != "/" and not mounts[str(above)].get("readOnly"), path
        read = [config.tls_certificate, config.tls_key, config.tls_authority]
        read += [config.model] if config.model.startswith("/") else []
        for path in filter(None, read):
            assert any(Path(path).is_relative_to(mount) for mount in mounts), path
        if config.commit_log:
            assert "persistentVolumeClaim" in volumes[mounts["/var/lib/spotjax"]["name"]]
        else:
            memory = volumes[mounts["/dev/shm"]["name"]]["emptyDir"]
            assert memory["medium"] == "Memory"
            limit = container["resources"]["limits"]["memory"]
            assert 1 <= int(memory["sizeLimit"].removesuffix("Gi")) < int(limit.removesuffix("Gi"))


@each
def test_pods_have_no_rights_that_they_do_not_need(name: str) -> None:
    manifests = deployment(name)
    (account,) = of_kind(manifests, "ServiceAccount")
    (space,) = of_kind(manifests, "Namespace")
    assert account["automountServiceAccountToken"] is False
    assert space["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for _, template in pods(manifests):
        spec, container = template["spec"], container_of(template)
        assert spec["serviceAccountName"] == account["metadata"]["name"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False, "its variables would be taken for settings"
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] == USER
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"] and context["capabilities"] == {"drop": ["ALL"]}
        assert context["allowPrivilegeEscalation"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        kinds = {next(iter(volume.keys() - {"name"})) for volume in spec["volumes"]}
        assert kinds <= {"emptyDir", "configMap", "secret", "persistentVolumeClaim"}


@each
def test_the_controller_is_one_and_on_no_spot_node(name: str) -> None:
    manifests = deployment(name)
    controller = next(m for m in of_kind(manifests, "Deployment") if m["metadata"]["name"] == "spotjax-controller")
    assert controller["spec"]["replicas"] == 1
    assert controller["spec"]["strategy"] == {"type": "Recreate"}
    affinity = controller["spec"]["template"]["spec"]["affinity"]["nodeAffinity"]
    ((term),) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    refused = {(e["key"], value) for e in term["matchExpressions"] for value in e["values"] if e["operator"] == "NotIn"}
    assert {label for kind in CLUSTERS.values() for label in kind.spot_labels} == refused
    (claim,) = of_kind(manifests, "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == [
        "ReadWriteOnce" if DEPLOYMENTS[name].cluster == "local" else "ReadWriteOncePod"
    ]


@each
def test_workers_ask_for_accelerators_on_spot_nodes(name: str) -> None:
    options = DEPLOYMENTS[name]
    for _, template in pods(deployment(name)):
        container, spec = container_of(template), template["spec"]
        if container["name"] != "worker" or options.cluster == "local":
            continue
        assert container["resources"]["limits"][options.kind.resource] == str(options.devices)
        assert spec["nodeSelector"][options.kind.accelerator_label] == options.accelerator
        terms = spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
        assert [(e["key"], e["operator"], *e["values"]) for term in terms for e in term["matchExpressions"]] == [
            (key, "In", value) for key, value in options.kind.spot_labels
        ]
        assert {t["key"] for t in spec["tolerations"]} >= {options.kind.resource}


def test_hosts_of_a_slice_know_their_numbers_and_where_they_meet(tmp_path: Path) -> None:
    options, manifests = DEPLOYMENTS["gke-tpu-slices"], deployment("gke-tpu-slices")
    slices = of_kind(manifests, "StatefulSet")
    assert [one["spec"]["replicas"] for one in slices] == [4] * options.workers
    names = set()
    for one in slices:
        template, service = one["spec"]["template"], one["spec"]["serviceName"]
        for ordinal in range(options.hosts):
            arguments = parsed(container_of(template)["command"], manifests, tmp_path)
            environment = environment_of(one, template, ordinal)
            config = settings.load(arguments, environment)
            assert (config.slice_host, config.slice_hosts) == (ordinal, 4)
            assert config.slice_coordinator.startswith(f"{one['metadata']['name']}-0.{service}:")
            assert config.devices_per_instance == 16
            hostnames = environment["TPU_WORKER_HOSTNAMES"].split(",")
            assert hostnames[int(environment["TPU_WORKER_ID"])] == f"{one['metadata']['name']}-{ordinal}.{service}"
            names.add(config.name)
        assert one["spec"]["updateStrategy"] == {"type": "OnDelete"}
    assert len(names) == options.workers
    (headless,) = (s for s in of_kind(manifests, "Service") if s["metadata"]["name"] == "spotjax-slices")
    assert headless["spec"]["clusterIP"] == "None" and headless["spec"]["publishNotReadyAddresses"]


def test_a_slice_has_a_node_pool_to_itself() -> None:
    slices = of_kind(deployment("gke-tpu-slices"), "StatefulSet")
    labels = [one["spec"]["template"]["metadata"]["labels"] for one in slices]
    for number, one in enumerate(slices):
        affinity = one["spec"]["template"]["spec"]["affinity"]
        for kind, wanted in (("podAffinity", {number}), ("podAntiAffinity", {0, 1, 2} - {number})):
            (rule,) = affinity[kind]["requiredDuringSchedulingIgnoredDuringExecution"]
            assert rule["topologyKey"] == "cloud.google.com/gke-nodepool"
            assert {n for n, own in enumerate(labels) if selects(rule["labelSelector"], own)} == wanted


def test_the_budget_lets_one_worker_go_and_any_that_is_not_in_the_fleet() -> None:
    for name in DEPLOYMENTS:
        (budget,) = of_kind(deployment(name), "PodDisruptionBudget")
        assert budget["spec"]["maxUnavailable"] == 1
        assert budget["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


def test_other_settings_make_other_pods() -> None:
    def digests(options: KubernetesOptions) -> list[str]:
        return [template["metadata"]["annotations"]["spotjax/settings"] for _, template in pods(applied(options))]

    base = {"cluster": "local", "image": IMAGE}
    (controller, worker), (changed, same) = (
        digests(KubernetesOptions(**base)),
        digests(KubernetesOptions(**base, settings={"max_batch": 2})),
    )
    assert (controller != changed, worker == same) == (True, True)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"cluster": "nomad"}, "cluster"),
        ({"image": "two words"}, "image"),
        ({"image": "Upper"}, "image"),
        ({"namespace": "default"}, "namespace"),
        ({"namespace": "kube-system"}, "namespace"),
        ({"namespace": "Upper"}, "namespace"),
        ({"workers": 0}, "workers"),
        ({"workers": "2"}, "workers"),
        ({"memory_gib": 1}, "memory_gib (1) must be more than shared_memory_gib (1)"),
        ({"notice_seconds": 3.0}, "notice_seconds (3)"),
        ({"notice_seconds": 4000.0}, "notice_seconds"),
        ({"pre_stop_seconds": -1}, "pre_stop_seconds"),
        ({"accelerator": "nvidia-l4"}, "accelerator must be empty"),
        ({"cluster": "gke-gpu"}, "cloud.google.com/gke-accelerator"),
        ({"cluster": "gke-tpu", "accelerator": "tpu-v5p-slice"}, "topology must be such as 2x4"),
        ({"cluster": "gke-tpu", "accelerator": "tpu-v5p-slice", "topology": "8"}, "topology"),
        ({"cluster": "gke-tpu", "accelerator": "a", "topology": "2x3", "devices": 4}, "topology (2x3)"),
        ({"topology": "2x4"}, "topology must be empty"),
        ({"controller_tls_secret": "tls"}, "go together"),
        ({"priority_class": "a b"}, "priority_class"),
        ({"zone": "a\nb"}, "zone"),
        ({"zone": "a\n"}, "zone"),
        ({"model": ""}, "model"),
        ({"settings": {"max_bach": 4}}, "max_batch"),
        ({"settings": {"max_batch": 0}}, "setting max_batch"),
        ({"settings": {"listen": "0.0.0.0:1"}}, "setting listen follows"),
        ({"settings": {"instances": 3}}, "setting instances follows"),
    ],
)
def test_options_that_are_wrong_are_refused_by_name(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        KubernetesOptions(**{"cluster": "local", "image": IMAGE} | wrong)
    assert said in str(refused.value)


def test_settings_that_contradict_each_other_are_refused() -> None:
    options = KubernetesOptions(cluster="local", image=IMAGE, settings={"recovery": "rerouting", "leave": "late"})
    with pytest.raises(ConfigError, match="leave"):
        applied(options)


def test_the_command_prints_the_manifests_of_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--cluster",
        "local",
        "--image",
        IMAGE,
        "--workers",
        "5",
        "--notice-seconds",
        "20",
        "--setting",
        "max_batch=3",
    ]
    assert cli.main(["bootstrap", "k8s", *flags]) == 0
    options = KubernetesOptions(cluster="local", image=IMAGE, workers=5, notice_seconds=20.0, settings={"max_batch": 3})
    assert capsys.readouterr().out == render(options)


def test_every_kind_of_cluster_can_be_asked_for() -> None:
    assert {options.cluster for options in DEPLOYMENTS.values()} == set(CLUSTERS)
