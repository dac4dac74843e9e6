"""The manifests of deploy/, as files and rendered, and what their pods consist of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
KUSTOMIZE = ROOT / "deploy" / "kustomize"
KSERVE = ROOT / "deploy" / "kserve"
OVERLAYS = sorted(path.name for path in (KUSTOMIZE / "overlays").iterdir())

Manifest = dict[str, Any]


def documents(path: Path) -> list[Manifest]:
    """The documents of a YAML file."""
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def manifest(path: str) -> Manifest:
    """The only document of a file below deploy/."""
    (found,) = documents(ROOT / "deploy" / path)
    return found


def kustomizations() -> Iterator[tuple[Path, Manifest]]:
    """Folder -> what its kustomization.yaml says."""
    for path in sorted((ROOT / "deploy").rglob("kustomization.yaml")):
        (document,) = documents(path)
        yield path.parent, document


def pod_spec(workload: Manifest) -> Manifest:
    """The spec of the pods of a deployment, stateful set or job."""
    spec: Manifest = workload["spec"]["template"]["spec"]
    return spec


def container(workload: Manifest) -> Manifest:
    """The only container of a workload's pods."""
    (found,) = pod_spec(workload)["containers"]
    return dict(found)


def probe_seconds(probe: Manifest) -> int:
    """How long a probe may fail before it counts."""
    return int(probe["periodSeconds"] * probe["failureThreshold"])


def patched_arguments(overlay: str) -> list[str]:
    """The arguments that an overlay or base adds to a container."""
    found = []
    for patch in manifest(f"kustomize/{overlay}/kustomization.yaml").get("patches", ()):
        operations = yaml.safe_load(patch["patch"])
        if isinstance(operations, list):
            found += [one["value"] for one in operations if one["path"].endswith("/args/-")]
    return found
