"""The overlays as kubectl renders them, validated by the tools of scripts/check_manifests."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from deployment.manifests import KSERVE, KUSTOMIZE, OVERLAYS, ROOT, Manifest, container, documents, pod_spec

PYTHON = ROOT / ".venv-kubernetes" / "bin" / "python3"
SECONDS = 600
POOLS = ("pools-1x7", "pools-1x7-hpa", "gateway-ha")
WRONG = (
    ("apps/v1", "Deployment", {"replica": 2, "selector": {}, "template": {}}, "replica"),
    (
        "keda.sh/v1alpha1",
        "ScaledObject",
        {"scaleTargetRef": {"name": "a", "nam": "b"}, "triggers": []},
        ".scaleTargetRef.nam is no field",
    ),
    (
        "monitoring.coreos.com/v1",
        "PodMonitor",
        {"selector": {}, "podMetricsEndpoints": [{"prt": "a"}]},
        "[0].prt is no field",
    ),
    (
        "serving.kserve.io/v1beta1",
        "InferenceService",
        {"predictor": {"model": {"storageURI": "a"}}},
        ".model.storageURI is no field",
    ),
    ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet", {}, "nothing here validates leaderworkerset.x-k8s.io/v1"),
)
"""Manifests with one fault each: version, kind, spec, what the check says of it."""


@pytest.fixture(scope="module")
def tools() -> Path:
    """A Python that has the tools."""
    if not PYTHON.exists():
        pytest.skip("no environment with the tools of Kubernetes: ./scripts/check_manifests makes it")
    return PYTHON


def check(python: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [python, ROOT / "scripts" / "check_manifests.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)


@pytest.fixture(scope="module")
def checked(tools: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """The check of everything and of a folder with faults, in one run, and the folder of what it rendered."""
    wrong = tmp_path_factory.mktemp("wrong")
    names = [f"{index}.yaml" for index in range(len(WRONG))]
    (wrong / "kustomization.yaml").write_text(f"resources: [{', '.join(names)}]\n")
    for name, (version, kind, spec, _) in zip(names, WRONG, strict=True):
        text = f"apiVersion: {version}\nkind: {kind}\nmetadata: {{name: wrong}}\nspec: {spec!r}\n"
        (wrong / name).write_text(text)
    rendered = tmp_path_factory.mktemp("rendered")
    folders = [*(KUSTOMIZE / "overlays" / name for name in OVERLAYS), KSERVE, wrong]
    return check(tools, "--quick", "--write", rendered, *folders), rendered


@pytest.fixture(scope="module")
def overlays(checked: tuple[subprocess.CompletedProcess[str], Path]) -> dict[str, list[Manifest]]:
    return {name: documents(checked[1] / f"{name}.yaml") for name in OVERLAYS}


def of_kind(manifests: list[Manifest], *kinds: str) -> dict[str, Manifest]:
    """Name -> manifest, of some kinds."""
    return {one["metadata"]["name"]: one for one in manifests if one["kind"] in kinds}


def test_only_what_is_wrong_has_faults(checked: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, _ = checked
    assert done.returncode == 1, done.stderr
    counts = [line.rpartition(", ")[2] for line in done.stdout.splitlines()]
    assert counts[:-1] == ["0 faults"] * (len(OVERLAYS) + 1), done.stderr
    for _, kind, _, fault in WRONG:
        assert any(f"{kind} wrong" in line and fault in line for line in done.stderr.splitlines()), (kind, done.stderr)


def test_each_pod_of_an_overlay_has_a_budget_and_a_policy(overlays: dict[str, list[Manifest]]) -> None:
    for name, manifests in overlays.items():
        for kind in ("PodDisruptionBudget", "NetworkPolicy"):
            selectors = [
                (one["spec"].get("selector") or one["spec"].get("podSelector"))["matchLabels"]
                for one in of_kind(manifests, kind).values()
                if one["metadata"]["name"] not in {"deny-all"}
            ]
            for workload in of_kind(manifests, "Deployment", "StatefulSet").values():
                labels = workload["spec"]["template"]["metadata"]["labels"]
                matching = [selector for selector in selectors if selector.items() <= labels.items()]
                assert len(matching) == 1, (name, kind, workload["metadata"]["name"])
        assert of_kind(manifests, "NetworkPolicy")["deny-all"]["spec"]["podSelector"] == {}


def test_servers_hear_gateways_alone(overlays: dict[str, list[Manifest]]) -> None:
    for manifests in overlays.values():
        servers = of_kind(manifests, "Deployment")
        policies = of_kind(manifests, "NetworkPolicy")
        reached: set[str] = set()
        for peer in policies["gateway"]["spec"]["egress"][0]["to"]:
            reached |= set(peer["podSelector"]["matchExpressions"][0]["values"])
        for name, server in servers.items():
            requests, metrics = policies[name]["spec"]["ingress"]
            (peer,) = requests["from"]
            assert peer["podSelector"]["matchExpressions"][0]["values"] == ["gateway"]
            assert [port["port"] for port in requests["ports"]] == ["grpc"]
            assert [port["port"] for port in metrics["ports"]] == ["metrics"]
            assert policies[name]["spec"]["egress"] == []
            assert server["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"] in reached


def test_names_lead_somewhere(overlays: dict[str, list[Manifest]]) -> None:
    """Claims, service accounts, services that the gateway calls, and what is scaled."""
    for name, manifests in overlays.items():
        assert {one["metadata"].get("namespace", "glm-image") for one in manifests} == {"glm-image"}
        workloads = of_kind(manifests, "Deployment", "StatefulSet")
        for workload in workloads.values():
            spec = pod_spec(workload)
            assert spec["serviceAccountName"] in of_kind(manifests, "ServiceAccount")
            claims = {
                one["persistentVolumeClaim"]["claimName"] for one in spec["volumes"] if "persistentVolumeClaim" in one
            }
            assert claims <= set(of_kind(manifests, "PersistentVolumeClaim"))
        urls = [part for part in container(workloads["gateway"])["args"] if "grpc://" in part]
        called = {url.rpartition("//")[2].removesuffix(":8001") for url in urls}
        assert called == set(of_kind(manifests, "Deployment")) <= set(of_kind(manifests, "Service"))
        scaled = of_kind(manifests, "ScaledObject", "HorizontalPodAutoscaler").values()
        assert {one["spec"]["scaleTargetRef"]["name"] for one in scaled} == (called if name in POOLS else set())


def test_pools_are_addressed_by_member_and_one_pod_by_its_service(overlays: dict[str, list[Manifest]]) -> None:
    for name, manifests in overlays.items():
        services = of_kind(manifests, "Service")
        for server in of_kind(manifests, "Deployment"):
            assert services[server]["spec"].get("clusterIP") == ("None" if name in POOLS else None)


def test_what_overlays_add(overlays: dict[str, list[Manifest]]) -> None:
    npu: dict[str, Any] = pod_spec(of_kind(overlays["npu-8-volcano"], "Deployment")["glm-image"])
    assert npu["schedulerName"] == "volcano"
    assert npu["securityContext"]["supplementalGroups"] == [1000]
    gateways = of_kind(overlays["gateway-ha"], "StatefulSet")["gateway"]
    assert gateways["spec"]["replicas"] == 3
    assert pod_spec(gateways)["topologySpreadConstraints"][0]["whenUnsatisfiable"] == "DoNotSchedule"


@pytest.mark.full
def test_checkov_finds_nothing(tools: Path, tmp_path: Path) -> None:
    done = check(tools)
    assert (done.returncode, done.stderr) == (0, "")
    assert ", 0 failed" in done.stdout
    # The same pod with more rights than it needs.
    (tmp_path / "kustomization.yaml").write_text("resources: [pod.yaml]\n")
    spec = "{containers: [{name: a, image: a, securityContext: {privileged: true}}]}"
    (tmp_path / "pod.yaml").write_text(f"apiVersion: v1\nkind: Pod\nmetadata: {{name: a}}\nspec: {spec}\n")
    assert "CKV_K8S_16" in check(tools, tmp_path).stderr
