"""The manifests have the fields that JobSet and Kubeflow Trainer document, and what the how-to page says of them."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "examples/kubernetes").glob("*.yaml"))
MANIFESTS = {path.name: yaml.safe_load(path.read_text()) for path in FILES}
SCHEMA = yaml.safe_load((Path(__file__).parent / "kubernetes_schema.yaml").read_text())
TYPES: dict[str, Any] = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}


def faults(value: Any, schema: dict[str, Any], where: str = "") -> Iterator[str]:
    """What is wrong with a value, by JSON Schema's keywords; objects have no fields but those that are named."""
    if "$ref" in schema:
        schema = SCHEMA["$defs"][schema["$ref"]]
    if "enum" in schema and value not in schema["enum"]:
        yield f"{where}: {value!r} is none of {schema['enum']}"
    kind = TYPES.get(schema.get("type", ""), object)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        yield f"{where}: {value!r} is no {schema['type']}"
        return
    if "pattern" in schema and not re.search(schema["pattern"], value):
        yield f"{where}: {value!r} is not like {schema['pattern']}"
    if "minimum" in schema and value < schema["minimum"]:
        yield f"{where}: {value!r} is less than {schema['minimum']}"
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from faults(item, schema["items"], f"{where}[{number}]")
    if isinstance(value, dict):
        known = schema.get("properties", {})
        yield from (f"{where}.{name} is missing" for name in schema.get("required", ()) if name not in value)
        for name, item in value.items():
            if "values" in schema or name in known:
                yield from faults(item, schema["values"] if "values" in schema else known[name], f"{where}.{name}")
            else:
                yield f"{where}.{name} is no field"


def faults_of(manifest: dict[str, Any]) -> list[str]:
    return list(faults(manifest, SCHEMA[f"{manifest['apiVersion']}/{manifest['kind']}"]))


def pods(node: Any) -> Iterator[dict[str, Any]]:
    """Every pod's spec in a manifest."""
    if isinstance(node, dict):
        if "containers" in node:
            yield node
        for value in node.values():
            yield from pods(value)
    elif isinstance(node, list):
        for value in node:
            yield from pods(value)


def variables(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield from node.get("env", ())
        for value in node.values():
            yield from variables(value)
    elif isinstance(node, list):
        for value in node:
            yield from variables(value)


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifest_is_as_documented(name: str) -> None:
    assert faults_of(MANIFESTS[name]) == []


def test_faults_are_found() -> None:
    manifest = copy.deepcopy(MANIFESTS["jobset.yaml"])
    pod = next(pods(manifest))
    pod["restartPolicy"] = "Always"
    pod["containers"][0]["env"][0]["value"] = 2
    pod["volumes"][0]["emptyDir"]["medum"] = "Memory"
    del manifest["metadata"]["name"]
    found = faults_of(manifest)
    assert len(found) == 4
    for word in ("'Always'", "2 is no string", "medum", "name is missing"):
        assert any(word in fault for fault in found), word


@pytest.mark.parametrize("name", ["jobset.yaml", "training-runtime.yaml"])
def test_pod_keeps_windows_in_memory_and_has_time_to_drain(name: str) -> None:
    from moetion_lightning.config import EngineConfig

    (pod,) = pods(MANIFESTS[name])
    (container,) = pod["containers"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    assert set(mounts.values()) == set(volumes)
    assert pod["restartPolicy"] == "OnFailure"  # in the same pod, where the windows are
    assert pod["terminationGracePeriodSeconds"] > EngineConfig().grace_seconds


def test_variables_are_options_of_torchrun() -> None:
    options = {f"PET_{action.dest.upper()}" for action in get_args_parser()._actions if action.option_strings}
    named = {variable["name"] for manifest in MANIFESTS.values() for variable in variables(manifest)}
    assert {name for name in named if name.startswith("PET_")} <= options
    assert {name for name in named if not name.startswith("PET_")} == {"MOETION_JOB_ID", "MOETION_SECRET"}


def test_train_job_takes_our_runtime() -> None:
    runtime, job = MANIFESTS["training-runtime.yaml"], MANIFESTS["train-job.yaml"]
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    address = next(v["value"] for v in variables(MANIFESTS["jobset.yaml"]) if v["name"] == "PET_RDZV_ENDPOINT")
    name = MANIFESTS["jobset.yaml"]["metadata"]["name"]
    assert address == f"{name}-node-0-0.{name}:29400"
