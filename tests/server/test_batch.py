"""The RayJob: its pods valid and restricted, its command one that `label` knows, its image pinned."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer.main
import yaml

from cbpt_runtime.cli.app import app

FOLDER = Path(__file__).parents[2] / "server" / "kubernetes" / "batch"
VERSIONS = ("1.30", "1.33", "1.35")


def read(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text())


def groups() -> list[dict[str, Any]]:
    cluster = read("rayjob.yaml")["spec"]["rayClusterSpec"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


@pytest.mark.parametrize("version", VERSIONS)
def test_its_pods_and_all_else_follow_the_schemas(version: str) -> None:
    pods = [{"apiVersion": "v1", "kind": "Pod", **group["template"]} for group in groups()]
    for resource in (*pods, read("namespace.yaml"), read("networkpolicy.yaml")):
        kubernetes_validate.validate(resource, version, strict=True)
    pods[0]["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(kubernetes_validate.ValidationError, match="volumeMount"):
        kubernetes_validate.validate(pods[0], version, strict=True)


def test_it_is_a_resource_of_kuberay_that_scales_and_goes() -> None:
    job = read("rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is True
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_its_containers_meet_the_restricted_standard() -> None:
    assert read("namespace.yaml")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    options = read("rayjob.yaml")["spec"]["rayClusterSpec"]["autoscalerOptions"]
    containers = [container for group in groups() for container in group["template"]["spec"]["containers"]]
    for context in (options["securityContext"], *(container["securityContext"] for container in containers)):
        assert context["runAsNonRoot"] is True
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in containers:
        assert container["resources"]["requests"] == container["resources"]["limits"]


def test_its_command_is_one_label_knows_and_its_paths_are_mounted() -> None:
    words = shlex.split(read("rayjob.yaml")["spec"]["entrypoint"])
    assert words[:2] == ["cbpt-runtime", "label"]
    label = typer.main.get_command(app).commands["label"]  # type: ignore[attr-defined]
    values = label.make_context("label", words[2:]).params
    assert values["resume"] is True
    head, worker = (
        [m["mountPath"] for m in g["template"]["spec"]["containers"][0]["volumeMounts"]] for g in groups()
    )
    assert values["classifier"] in head
    assert values["classifier"] in worker
    assert str(values["output"].parent) in head
    for group in groups():
        spec = group["template"]["spec"]
        mounts = {mount["name"] for mount in spec["containers"][0]["volumeMounts"]}
        assert mounts == {volume["name"] for volume in spec["volumes"]}


def test_only_its_own_pods_and_the_operator_reach_ray() -> None:
    spec = read("networkpolicy.yaml")["spec"]
    assert spec["policyTypes"] == ["Ingress"]
    own, operator = spec["ingress"]
    assert own["from"] == [{"podSelector": spec["podSelector"]}]
    assert operator["ports"] == [{"port": 8265}]
    for group in groups():
        assert group["template"]["metadata"]["labels"] == spec["podSelector"]["matchLabels"]


def test_kustomize_renames_the_image_of_every_pod() -> None:
    kustomization = read("kustomization.yaml")
    (image,) = kustomization["images"]
    assert image["newTag"] == version("cbpt-runtime")
    assert {group["template"]["spec"]["containers"][0]["image"] for group in groups()} == {image["name"]}
    listed = {*kustomization["resources"], *kustomization["configurations"], "kustomization.yaml"}
    assert {file.name for file in FOLDER.glob("*.yaml")} == listed
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("no kubectl on PATH")
    done = subprocess.run([kubectl, "kustomize", str(FOLDER)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"image: {image['newName']}:{image['newTag']}") == len(groups())


def test_the_image_has_the_ray_that_the_job_names_and_runs_as_nobody_special() -> None:
    text = (FOLDER / "Dockerfile").read_text()
    ray = read("rayjob.yaml")["spec"]["rayClusterSpec"]["rayVersion"]
    assert f"FROM rayproject/ray:{ray}-py311-cpu" in text
    assert text.rstrip().endswith("USER 1000:100")
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    assert hadolint is not None, "the `test` extra installs it"
    command = [hadolint, "--no-color", "--failure-threshold", "style", str(FOLDER / "Dockerfile")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
