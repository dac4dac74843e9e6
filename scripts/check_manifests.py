"""Renders every overlay of deploy/ by ``kubectl kustomize`` and validates each manifest; runs in .venv-kubernetes.

Kinds of Kubernetes itself are validated by the schemas of kubernetes-validate, strictly. Custom kinds are read by the
models of their packages; a field that no model has is a fault, and so is a kind that nothing here knows. checkov then
looks for what gives a pod more rights than it needs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import sysconfig
import tempfile
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
PROGRAMS = Path(sysconfig.get_path("scripts"))
EXIT_FAULTS = 1

PYDANTIC_KINDS = {
    ("keda.sh/v1alpha1", "ScaledObject"): "cloudcoil.models.keda.v1alpha1",
    ("monitoring.coreos.com/v1", "PodMonitor"): "cloudcoil.models.prometheus_operator.v1",
    ("monitoring.coreos.com/v1", "PrometheusRule"): "cloudcoil.models.prometheus_operator.v1",
}
"""Custom kinds and the module of their model. LeaderWorkerSet and Volcano have no models here, so none is allowed."""

KSERVE_KINDS = {
    ("serving.kserve.io/v1alpha1", "ClusterServingRuntime"): "V1alpha1ClusterServingRuntime",
    ("serving.kserve.io/v1beta1", "InferenceService"): "V1beta1InferenceService",
}

SKIPPED_CHECKS = {
    "CKV_K8S_15": "imagePullPolicy Always: an image that is named by its digest does not change",
    "CKV_K8S_43": "the digest: the manifests have a local name, which the operator replaces",
}
"""Checks of checkov that do not apply, with the reason."""

Manifest = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="check_manifests", description="Renders and validates what is in deploy/.")
    parser.add_argument("--quick", action="store_true", help="without checkov")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="also write what is rendered to NAME.yaml there")
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="default: every overlay, and KServe's")
    flags = parser.parse_args(arguments)
    folders = flags.folders
    if not folders:
        folders = [*sorted((DEPLOY / "kustomize" / "overlays").iterdir()), DEPLOY / "kserve"]
    with tempfile.TemporaryDirectory() as temporary:
        written = Path(temporary) if flags.write is None else flags.write
        written.mkdir(parents=True, exist_ok=True)
        faults = []
        known_faults = remembered(lambda manifest: list(faults_of(manifest)))
        for folder in folders:
            text = rendered(folder)
            (written / f"{folder.resolve().name}.yaml").write_text(text, encoding="utf-8")
            manifests = [manifest for manifest in yaml.safe_load_all(text) if manifest]
            found = [f"{folder.resolve().name}: {fault}" for manifest in manifests for fault in known_faults(manifest)]
            print(f"{folder.resolve().name}: {len(manifests)} manifests, {len(found)} faults")
            faults += found
        if not flags.quick:
            faults += checkov_faults(written)
    for fault in faults:
        print(fault, file=sys.stderr)
    return EXIT_FAULTS if faults else 0


def rendered(folder: Path) -> str:
    """Returns the manifests of a folder with a kustomization.yaml, as YAML."""
    command = [PROGRAMS / "kubectl", "kustomize", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or done.stderr:  # a warning is of a deprecated field
        raise SystemExit(f"{folder}: {done.stderr}")
    return done.stdout


def remembered(check: Callable[[Manifest], list[str]]) -> Callable[[Manifest], list[str]]:
    """Returns a check that runs once for equal manifests: overlays share most of them."""
    found: dict[str, list[str]] = {}

    def checked(manifest: Manifest) -> list[str]:
        key = json.dumps(manifest, sort_keys=True, default=str)
        if key not in found:
            found[key] = check(manifest)
        return found[key]

    return checked


def faults_of(manifest: Manifest) -> Iterator[str]:
    """Yields what is wrong with a manifest, one sentence a fault."""
    kind = (str(manifest.get("apiVersion")), str(manifest.get("kind")))
    name = f"{kind[1]} {manifest.get('metadata', {}).get('name')}"
    if kind in PYDANTIC_KINDS:
        model = getattr(importlib.import_module(PYDANTIC_KINDS[kind]), kind[1])
        yield from (f"{name}: {fault}" for fault in pydantic_faults(model, manifest))
    elif kind in KSERVE_KINDS:
        yield from (f"{name}: {fault}" for fault in openapi_faults(KSERVE_KINDS[kind], manifest))
    else:
        try:
            kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
        except kubernetes_validate.SchemaNotFoundError:
            yield f"{name}: nothing here validates {kind[0]}"
        except kubernetes_validate.ValidationError as error:
            yield f"{name}: {'.'.join(map(str, error.path))}: {error.message}"


def pydantic_faults(model: Any, manifest: Manifest) -> Iterator[str]:
    """Yields values that a model of pydantic refuses, and fields that it lacks and passes over."""
    try:
        model.model_validate(manifest)
    except ValueError as error:
        yield str(error)
    yield from unknown_fields(model, manifest, "")


def unknown_fields(annotation: Any, value: object, path: str) -> Iterator[str]:
    """Yields the fields of a value that its type, a model or a container of models, does not have."""
    models = list(models_in(annotation))
    if isinstance(value, list):
        for index, one in enumerate(value):
            yield from unknown_fields(annotation, one, f"{path}[{index}]")
    elif isinstance(value, dict) and models:
        fields = {field.alias or name: field for model in models for name, field in model.model_fields.items()}
        for name, one in value.items():
            if name in fields:
                yield from unknown_fields(fields[name].annotation, one, f"{path}.{name}")
            else:
                yield f"{path}.{name} is no field of {models[0].__name__}"


def models_in(annotation: Any) -> Iterator[Any]:
    """Yields the models of pydantic that a type consists of; none below a mapping, whose keys are free."""
    if typing.get_origin(annotation) in {dict, Mapping}:
        return
    if isinstance(annotation, type) and hasattr(annotation, "model_fields"):
        root = annotation.model_fields.get("root")
        yield from [annotation] if root is None else models_in(root.annotation)
    for argument in typing.get_args(annotation):
        yield from models_in(argument)


def openapi_faults(name: str, value: object, path: str = "") -> Iterator[str]:
    """Yields the fields of a value that a type of KServe's or Kubernetes' Python client does not have or allow.

    ``name`` is a type as ``openapi_types`` has it: ``str``, ``list[V1Container]``, ``dict(str, str)``, ``V1Volume``.
    """
    items = re.fullmatch(r"list\[(.*)\]", name)
    values = re.fullmatch(r"dict\(str, (.*)\)", name)
    scalars: dict[str, type | types.UnionType] = {"str": str, "int": int, "bool": bool, "float": int | float}
    if items:
        if not isinstance(value, list):
            yield f"{path} is {value!r}; allowed: a list"
            return
        for index, one in enumerate(value):
            yield from openapi_faults(items[1], one, f"{path}[{index}]")
    elif values:
        for key, one in dict(typing.cast("Any", value)).items():
            yield from openapi_faults(values[1], one, f"{path}.{key}")
    elif name in scalars:
        if not isinstance(value, scalars[name]):
            yield f"{path} is {value!r}; allowed: {name}"
    elif (model := openapi_model(name)) is not None:
        types_of = {model.attribute_map[attribute]: type_ for attribute, type_ in model.openapi_types.items()}
        for key, one in dict(typing.cast("Any", value)).items():
            if key in types_of:
                yield from openapi_faults(types_of[key], one, f"{path}.{key}")
            else:
                yield f"{path}.{key} is no field of {name}"


def openapi_model(name: str) -> Any:
    """Returns the class of a model; None for a type of free form, such as ``object``, a quantity or a date."""
    for package in ("kserve", "kubernetes.client"):
        model = getattr(importlib.import_module(package), name, None)
        if hasattr(model, "openapi_types"):
            return model
    return None


def checkov_faults(folder: Path) -> list[str]:
    """Returns the failed checks of checkov for the YAML files of a folder."""
    command = [PROGRAMS / "checkov", "--framework", "kubernetes", "--skip-download", "--quiet", "--compact"]
    command += ["--output", "json", "--skip-check", ",".join(SKIPPED_CHECKS), "--directory", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    report = json.loads(done.stdout)
    print(f"checkov: {report['summary']['passed']} checks passed, {report['summary']['failed']} failed")
    if not report["summary"]["passed"]:
        return [f"checkov has checked nothing: {done.stderr}"]
    failed = report["results"]["failed_checks"]
    return [f"{one['file_path']}: {one['resource']}: {one['check_id']} {one['check_name']}" for one in failed]


if __name__ == "__main__":
    sys.exit(main())
