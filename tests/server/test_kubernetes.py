"""Kubernetes and KServe manifests: valid against the schemas, restricted, and consistent with each other."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

KUBERNETES = Path(__file__).parents[2] / "server" / "kubernetes"
FOLDERS = ("base", "monitoring", "kserve")
VERSIONS = ("1.30", "1.33", "1.35")
CUSTOM = {  # no schema of these comes with Kubernetes
    "serving.kserve.io/v1alpha1": "ServingRuntime",
    "serving.kserve.io/v1beta1": "InferenceService",
}


def read(name: str) -> Any:
    return yaml.safe_load((KUBERNETES / name).read_text())


def resources(folder: str) -> dict[str, dict[str, Any]]:
    return {name: read(f"{folder}/{name}") for name in read(f"{folder}/kustomization.yaml")["resources"]}


def container(of: dict[str, Any]) -> dict[str, Any]:
    spec = of["spec"]
    (only,) = (spec if "containers" in spec else spec["template"]["spec"])["containers"]
    return dict(only)


@pytest.mark.parametrize("version", VERSIONS)
def test_manifests_follow_the_schemas(version: str) -> None:
    for name, resource in resources("base").items():
        try:
            kubernetes_validate.validate(resource, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            pytest.fail(f"{name}: {error.message}")


def test_a_misspelt_field_would_be_noticed() -> None:
    deployment = read("base/deployment.yaml")
    container(deployment)["securityContext"]["readOnlyRootFileSystem"] = True
    with pytest.raises(kubernetes_validate.ValidationError, match="readOnlyRootFileSystem"):
        kubernetes_validate.validate(deployment, VERSIONS[0], strict=True)


def test_custom_resources_are_of_the_kinds_kserve_has() -> None:
    for resource in resources("kserve").values():
        if resource["kind"] != "Namespace":
            assert CUSTOM[resource["apiVersion"]] == resource["kind"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_file_belongs_to_its_kustomization(folder: str) -> None:
    files = {file.name for file in (KUBERNETES / folder).glob("*.yaml")}
    listed = set(read(f"{folder}/kustomization.yaml")["resources"])
    assert files - listed == {"kustomization.yaml"} | (
        {"prometheus-adapter.yaml"} if folder == "monitoring" else set()
    )
    assert listed <= files


@pytest.mark.parametrize("folder", FOLDERS)
def test_kustomize_builds_it(folder: str) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("no kubectl on PATH")
    done = subprocess.run(
        [kubectl, "kustomize", str(KUBERNETES / folder)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    built = list(yaml.safe_load_all(done.stdout))
    assert len(built) == len(read(f"{folder}/kustomization.yaml")["resources"])
    spaces = {r["metadata"].get("namespace", r["metadata"]["name"]) for r in built}
    assert spaces == {"cbpt-runtime"}


@pytest.mark.parametrize("name", ["base/deployment.yaml", "kserve/servingruntime.yaml"])
def test_containers_meet_the_restricted_standard(name: str) -> None:
    resource = read(name)
    only = container(resource)
    pod = resource["spec"].get("template", {"spec": {}})["spec"].get("securityContext", {})
    context = pod | only["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["runAsUser"] == 1000
    assert context["allowPrivilegeEscalation"] is False
    assert context["readOnlyRootFilesystem"] is True
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert only["resources"]["requests"]["cpu"] == only["resources"]["limits"]["cpu"]
    assert only["resources"]["limits"]["memory"]
    enforced = read(f"{name.split('/')[0]}/namespace.yaml")["metadata"]["labels"]
    assert enforced["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize("name", ["base/deployment.yaml", "kserve/servingruntime.yaml"])
def test_arguments_are_those_of_serve_and_probes_ask_its_port(
    name: str, parse_serve: Callable[..., dict[str, Any]]
) -> None:
    only = container(read(name))
    values = parse_serve(only["args"])
    named = {port["name"]: port["containerPort"] for port in only["ports"]}
    for probe, path in (
        ("startupProbe", "/v2/health/ready"),
        ("readinessProbe", "/v2/health/ready"),
        ("livenessProbe", "/v2/health/live"),
    ):
        asked = only[probe]["httpGet"]
        assert named.get(asked["port"], asked["port"]) == values["http_port"]
        assert asked["path"] == path
    patience_s = only["startupProbe"]["periodSeconds"] * only["startupProbe"]["failureThreshold"]
    assert patience_s > values["startup_timeout_s"]


@pytest.mark.parametrize("name", ["base/deployment.yaml", "kserve/servingruntime.yaml"])
def test_nothing_but_tmp_and_shared_memory_can_be_written(name: str) -> None:
    spec = read(name)["spec"]
    pod = spec if "containers" in spec else spec["template"]["spec"]
    mounts = {mount["mountPath"]: mount for mount in container(read(name))["volumeMounts"]}
    assert {path for path, mount in mounts.items() if not mount.get("readOnly")} == {"/tmp", "/dev/shm"}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in mounts.values()} == set(volumes)
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
    assert all("sizeLimit" in volumes[name]["emptyDir"] for name in ("tmp", "shm"))


def test_everything_selects_the_pods_of_the_deployment() -> None:
    base = resources("base")
    labels = base["deployment.yaml"]["spec"]["template"]["metadata"]["labels"]
    assert base["deployment.yaml"]["spec"]["selector"]["matchLabels"] == labels
    assert base["service.yaml"]["spec"]["selector"] == labels
    assert base["pdb.yaml"]["spec"]["selector"]["matchLabels"] == labels
    assert base["networkpolicy.yaml"]["spec"]["podSelector"]["matchLabels"] == labels
    monitor = read("monitoring/servicemonitor.yaml")["spec"]
    assert monitor["selector"]["matchLabels"] == base["service.yaml"]["metadata"]["labels"]
    ports = {port["name"]: port for port in base["service.yaml"]["spec"]["ports"]}
    assert {endpoint["port"] for endpoint in monitor["endpoints"]} <= set(ports)
    named = {port["name"]: port["containerPort"] for port in container(base["deployment.yaml"])["ports"]}
    assert {port["targetPort"]: port["port"] for port in ports.values()} == named


def test_the_network_policy_lets_no_pod_out_and_only_the_named_namespaces_in() -> None:
    spec = read("base/networkpolicy.yaml")["spec"]
    assert set(spec["policyTypes"]) == {"Ingress", "Egress"}
    assert spec["egress"] == []
    ports = {8000: "gateway", 8001: "gateway", 8002: "monitoring"}
    found = {}
    for rule in spec["ingress"]:
        (peer,) = rule["from"]
        for port in rule["ports"]:
            found[port["port"]] = peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
    assert found == ports


def test_the_autoscaler_looks_at_the_metric_the_adapter_makes() -> None:
    hpa = read("base/hpa.yaml")["spec"]
    (metric,) = hpa["metrics"]
    (rule,) = read("monitoring/prometheus-adapter.yaml")["rules"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    deployment = read("base/deployment.yaml")
    assert hpa["scaleTargetRef"] == {
        "apiVersion": deployment["apiVersion"],
        "kind": deployment["kind"],
        "name": deployment["metadata"]["name"],
    }
    assert "replicas" not in deployment["spec"]  # applying it again would undo what the autoscaler did
    assert hpa["minReplicas"] > read("base/pdb.yaml")["spec"]["minAvailable"]


def test_the_pod_may_finish_its_requests() -> None:
    from cbpt_runtime.serving.config import ServeConfig

    pod = read("base/deployment.yaml")["spec"]["template"]["spec"]
    pause_s = int(container(read("base/deployment.yaml"))["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > ServeConfig().drain_timeout_s + pause_s + 1


def test_the_inference_service_names_its_runtime_and_format() -> None:
    service, runtime = read("kserve/inferenceservice.yaml"), read("kserve/servingruntime.yaml")
    model = service["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["modelFormat"]["name"] in {f["name"] for f in runtime["spec"]["supportedModelFormats"]}
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    assert container(runtime)["name"] == "kserve-container"
    port = runtime["spec"]["annotations"]["prometheus.kserve.io/port"]
    assert port in container(runtime)["args"]


@pytest.mark.parametrize("folder", ["base", "kserve"])
def test_the_image_is_the_one_kustomize_renames(folder: str) -> None:
    (image,) = read(f"{folder}/kustomization.yaml")["images"]
    name = "deployment.yaml" if folder == "base" else "servingruntime.yaml"
    assert container(read(f"{folder}/{name}"))["image"] == image["name"]
    assert image["newTag"] == version("cbpt-runtime")  # a release, not what happens to be the latest
