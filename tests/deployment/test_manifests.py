"""The files of deploy/, as far as they can be checked without tools of Kubernetes: against the project itself."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest

from capacity_planner import times
from deployment.manifests import (
    KSERVE,
    KUSTOMIZE,
    OVERLAYS,
    ROOT,
    container,
    documents,
    kustomizations,
    manifest,
    patched_arguments,
    pod_spec,
    probe_seconds,
)
from glm_image.ar.metrics import AR_METRICS
from glm_image.config.profiles import PROFILES
from glm_image.dit.metrics import DIT_METRICS
from glm_image.request.geometry import Size
from glm_image.request.limits import Limits
from glm_image.supervisor.cli import parse_arguments
from glm_image.watchdog.watchdog import STOP_GRACE_SECONDS
from glm_image_gateway.metrics import Metrics
from glm_image_gateway.settings import parse_settings

SERVER = manifest("kustomize/bases/server/deployment.yaml")
GATEWAY = manifest("kustomize/bases/gateway/stateful_set.yaml")
JOB = manifest("kustomize/components/download/job.yaml")
RUNTIME = manifest("kserve/cluster_serving_runtime.yaml")
SERVICE = manifest("kserve/inference_service.yaml")
ALERTS = [
    rule
    for group in manifest("kustomize/components/monitoring/alerts.yaml")["spec"]["groups"]
    for rule in group["rules"]
]
SCALED = documents(KUSTOMIZE / "components/keda/scaled_objects.yaml")
AUTOSCALED = documents(KUSTOMIZE / "components/hpa/autoscalers.yaml")
ENTRY_POINT = json.loads(re.findall(r"^ENTRYPOINT (.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[0])
ONE_POD = {
    "cuda-1x80g": ("cuda", "nvidia.com/gpu"),
    "cuda-8": ("cuda", "nvidia.com/gpu"),
    "npu-8": ("ascend", "huawei.com/Ascend910"),
}
SLOWEST_WEIGHTS = 20e6
WEIGHT_BYTES = 36e9
TRITON_METRICS = {"up"}
"""Not ours: Prometheus makes it for each target."""


def metric_names() -> set[str]:
    """Every sample that servers and gateways report."""
    names = set()
    for spec in (*AR_METRICS, *DIT_METRICS):
        names |= {spec.name} | {f"{spec.name}_{part}" for part in ("bucket", "sum", "count")}
    names |= set(re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE))
    for family in Metrics().registry.collect():
        names |= {family.name, f"{family.name}_total", f"{family.name}_bucket"}
    return names


def selected_metrics(query: str) -> set[str]:
    found: list[Any] = []
    promql.walk(promql.parse(query), found.append)
    return {node.name for node in found if isinstance(node, promql.VectorSelector)}


def stop_seconds(spec: dict[str, Any], drain: int) -> float:
    """Seconds from the order to stop until the server has ended by itself, at the latest."""
    (only,) = spec["containers"]
    return float(only["lifecycle"]["preStop"]["sleep"]["seconds"] + drain + STOP_GRACE_SECONDS)


def test_every_file_is_part_of_a_kustomization() -> None:
    named: set[Path] = set()
    for folder, document in kustomizations():
        for entry in (*document.get("resources", ()), *document.get("components", ())):
            path = (folder / entry).resolve()
            assert path.is_file() or (path / "kustomization.yaml").is_file(), f"{folder} names {entry}"
            named.add(path)
    files = {path for path in (ROOT / "deploy").rglob("*.yaml") if path.name != "kustomization.yaml"}
    assert files == {path for path in named if path.is_file()}
    folders = {folder for folder, _ in kustomizations()}
    assert folders - named == {*(KUSTOMIZE / "overlays" / name for name in OVERLAYS), KSERVE} - named


def test_the_overlays_are_documented() -> None:
    text = (ROOT / "docs" / "kubernetes.md").read_text()
    for name in OVERLAYS:
        assert f"`{name}`" in text
    assert {*ONE_POD, "pools-1x7", "gateway-ha"} <= set(OVERLAYS)


class TestServer:
    def arguments(self, base: str, *more: str) -> Any:
        """What serve reads in a container of a base."""
        return parse_arguments([*ENTRY_POINT[1:], *container(SERVER)["args"], *patched_arguments(base), *more])

    @pytest.mark.parametrize("stage", ["glm_ar", "glm_dit"])
    def test_a_pool_serves_one_stage(self, stage: str) -> None:
        base = f"bases/pools/{stage.replace('_', '-')}"
        assert self.arguments(base).models == (stage,)
        assert f"/v2/models/{stage}_stream/ready" in (KUSTOMIZE / base / "kustomization.yaml").read_text()

    @pytest.mark.parametrize("overlay", ONE_POD)
    def test_one_pod_has_the_cards_of_its_profile(self, overlay: str) -> None:
        image, resource = ONE_POD[overlay]
        assert self.arguments(f"overlays/{overlay}").profile == overlay
        document = manifest(f"kustomize/overlays/{overlay}/kustomization.yaml")
        assert [one["newTag"] for one in document["images"]] == [image]
        cards = len(PROFILES[overlay].devices)
        assert f"{resource}: {cards}}}" in document["patches"][0]["patch"]

    def test_the_start_is_long_enough_for_the_weights(self) -> None:
        assert probe_seconds(container(SERVER)["startupProbe"]) >= WEIGHT_BYTES / SLOWEST_WEIGHTS

    def test_liveness_does_not_end_what_the_watchdog_restarts(self) -> None:
        """A restart takes the watchdog's 10 s, its longest backoff of 30 s, and a start."""
        probes = container(SERVER)
        assert probe_seconds(probes["livenessProbe"]) > probe_seconds(probes["startupProbe"]) + 10 + 30

    def test_the_grace_covers_the_longest_request(self) -> None:
        drain = self.arguments("bases/pools/glm-dit").drain_seconds
        size, work = Size(2048, 2048), Limits().work
        seconds = times.H100.denoise_step(size) * work / (size.height * size.width / 1e6)
        assert drain > seconds
        assert pod_spec(SERVER)["terminationGracePeriodSeconds"] > stop_seconds(pod_spec(SERVER), drain)

    def test_tensors_and_weights_have_their_places(self) -> None:
        volumes = {volume["name"]: volume for volume in pod_spec(SERVER)["volumes"]}
        mounts = {mount["mountPath"]: mount for mount in container(SERVER)["volumeMounts"]}
        assert volumes[mounts["/dev/shm"]["name"]]["emptyDir"]["medium"] == "Memory"
        assert mounts["/checkpoint"]["readOnly"] is True
        assert "emptyDir" in volumes[mounts["/tmp"]["name"]]


class TestGateway:
    @pytest.mark.parametrize("base", ["bases/one-pod", "bases/pools"])
    def test_its_flags_are_its_own(self, base: str) -> None:
        settings = parse_settings([*container(GATEWAY)["args"], *patched_arguments(base)], {})
        services = {"bases/one-pod": {"glm-image"}, "bases/pools": {"glm-ar", "glm-dit"}}[base]
        assert set(re.findall(r"grpc://([\w-]+):8001", settings.server)) == services
        assert settings.port == container(GATEWAY)["ports"][0]["containerPort"]
        mounts = {mount["mountPath"] for mount in container(GATEWAY)["volumeMounts"]}
        assert {str(settings.state_folder), str(settings.api_keys.parent if settings.api_keys else None)} < mounts

    def test_the_grace_covers_its_longest_request(self) -> None:
        settings = parse_settings(container(GATEWAY)["args"], {})
        assert settings.drain_seconds >= settings.request_seconds
        grace = pod_spec(GATEWAY)["terminationGracePeriodSeconds"]
        assert grace > stop_seconds(pod_spec(GATEWAY), settings.drain_seconds)


@pytest.mark.parametrize("workload", [SERVER, GATEWAY, JOB], ids=["server", "gateway", "job"])
def test_a_pod_may_do_little(workload: dict[str, Any]) -> None:
    spec, only = pod_spec(workload), container(workload)
    assert spec["securityContext"].items() >= {"runAsNonRoot": True, "runAsUser": 10001, "runAsGroup": 10001}.items()
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    rights = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    assert only["securityContext"] == rights
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)


def test_the_job_calls_a_script_of_the_image() -> None:
    program, folder = container(JOB)["command"]
    copied = (ROOT / "Dockerfile").read_text()
    assert "COPY scripts/download scripts/download.py scripts/\n" in copied
    assert program == "/opt/glm-image/scripts/download"
    assert folder in {mount["mountPath"] for mount in container(JOB)["volumeMounts"] if not mount.get("readOnly")}


class TestAlerts:
    @pytest.mark.parametrize("rule", ALERTS, ids=[rule["alert"] for rule in ALERTS])
    def test_its_metrics_exist_and_its_runbook_too(self, rule: dict[str, Any]) -> None:
        names = selected_metrics(rule["expr"])
        assert names
        assert names - TRITON_METRICS <= metric_names()
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"

    def test_the_runbook_has_every_alert_and_no_other(self) -> None:
        section = (ROOT / "docs" / "operations.md").read_text().split("\n## Alerts\n")[1].split("\n## ")[0]
        assert re.findall(r"^### (\w+)$", section, re.MULTILINE) == [rule["alert"] for rule in ALERTS]


class TestScaling:
    @pytest.mark.parametrize("scaled", SCALED, ids=[one["metadata"]["name"] for one in SCALED])
    def test_keda_scales_a_pool_on_our_metric(self, scaled: dict[str, Any]) -> None:
        name = scaled["spec"]["scaleTargetRef"]["name"]
        assert (KUSTOMIZE / "bases" / "pools" / name).is_dir()
        (trigger,) = scaled["spec"]["triggers"]
        query = trigger["metadata"]["query"]
        assert query.count(f'stage="{name.replace("-", "_")}"') == 2
        names = selected_metrics(query)
        assert names == {"glm_image_gateway_queued_seconds", "glm_image_gateway_outstanding_seconds"}
        assert names <= metric_names()

    def test_the_autoscaler_of_kubernetes_does_the_same(self) -> None:
        for keda, own in zip(SCALED, AUTOSCALED, strict=True):
            ours, theirs = own["spec"], keda["spec"]
            assert ours["scaleTargetRef"] == theirs["scaleTargetRef"]
            assert (ours["minReplicas"], ours["maxReplicas"]) == (theirs["minReplicaCount"], theirs["maxReplicaCount"])
            assert ours["behavior"] == theirs["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
            (metric,) = ours["metrics"]
            assert metric["external"]["target"]["averageValue"] == theirs["triggers"][0]["metadata"]["threshold"]
            assert metric["external"]["metric"]["name"] in (ROOT / "docs" / "kubernetes.md").read_text()


class TestKServe:
    def test_the_container_serves_what_kserve_mounts(self) -> None:
        (only,) = RUNTIME["spec"]["containers"]
        assert only["name"] == "kserve-container"
        assert only["command"] == ENTRY_POINT[:1]
        settings = parse_arguments(only["args"])
        assert (str(settings.checkpoint), settings.host) == ("/mnt/models", "0.0.0.0")
        assert settings.profile in PROFILES
        ports = {port["name"]: port["containerPort"] for port in only["ports"]}
        assert ports == {"http1": settings.http_port, "h2c": settings.grpc_port}
        assert next(iter(ports)) == "http1"

    def test_it_has_the_probes_and_rights_of_the_base(self) -> None:
        (only,), base = RUNTIME["spec"]["containers"], container(SERVER)
        for name in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert json.loads(json.dumps(base[name]).replace('"http"', "8000")) == only[name]
        assert only["lifecycle"] == base["lifecycle"]
        assert only["securityContext"].items() >= base["securityContext"].items()
        grace = pod_spec(SERVER)["terminationGracePeriodSeconds"]
        assert SERVICE["spec"]["predictor"]["terminationGracePeriodSeconds"] == grace

    def test_the_service_chooses_the_runtime(self) -> None:
        model = SERVICE["spec"]["predictor"]["model"]
        assert model["runtime"] == RUNTIME["metadata"]["name"]
        assert model["modelFormat"]["name"] in {one["name"] for one in RUNTIME["spec"]["supportedModelFormats"]}
        assert model["protocolVersion"] in RUNTIME["spec"]["protocolVersions"]
        claim = manifest("kustomize/bases/namespace/weights.yaml")["metadata"]["name"]
        assert model["storageUri"] == f"pvc://{claim}"
