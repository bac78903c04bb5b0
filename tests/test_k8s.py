"""What `kubectl apply -k` would send: rendered by kustomize, and held against the schemas and against ourselves."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import kubernetes_validate
import pytest
import yaml
from cloudcoil.models.keda import v1alpha1 as keda
from cloudcoil.models.prometheus_operator import v1 as prometheus_operator
from pydantic import BaseModel

from monitoring.prometheus_rule import WRITTEN, prometheus_rule
from service.app import create_app
from service.settings import PREFIX, Settings
from service.transformer import settings_of
from tests.test_compose import COMPOSE
from tests.test_dockerfile import STAGES, said

ROOT = Path(__file__).parent.parent
K8S = ROOT / "k8s"
SERVING = ["overlays/cpu", "overlays/gpu", "overlays/keda"]
KSERVE = ["overlays/kserve", "overlays/kserve-transformer"]
OVERLAYS = [*SERVING, *KSERVE, "training"]
VERSION = "1.32"
OURS = ("clarifier:cpu", "clarifier:cuda", "clarifier:training")
DEFINED: dict[str, type[BaseModel]] = {
    "ScaledObject": keda.ScaledObject,
    "PodMonitor": prometheus_operator.PodMonitor,
    "PrometheusRule": prometheus_operator.PrometheusRule,
}
"""Kinds that operators define: Kubernetes' own schemas do not know them. KServe's are not to be had as a package."""
COMPONENT = {"minReplicas", "maxReplicas", "scaleMetric", "scaleTarget", "model"}
"""What a predictor or a transformer of KServe has beside the fields of a pod."""

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")

Object = dict[str, Any]


@cache
def rendered(overlay: str) -> list[Object]:
    """The objects of an overlay, with a password that was made as its comment says."""
    with TemporaryDirectory() as folder:
        copy = shutil.copytree(K8S, Path(folder) / "k8s")
        (copy / "base" / "redis_password").write_text("secret")
        line = ["kubectl", "kustomize", str(copy / overlay)]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def found(overlay: str, kind: str, name: str = "") -> list[Object]:
    return [each for each in rendered(overlay) if each["kind"] == kind and name in ("", each["metadata"]["name"])]


def pods(overlay: str) -> Iterator[tuple[str, Object]]:
    """Specs of pods, by the name of what makes them."""
    for each in rendered(overlay):
        if each["kind"] in ("Deployment", "StatefulSet", "Job"):
            yield each["metadata"]["name"], each["spec"]["template"]["spec"]
        elif each["kind"] == "InferenceService":
            component = each["spec"].get("transformer", each["spec"]["predictor"])
            yield each["metadata"]["name"], {key: value for key, value in component.items() if key not in COMPONENT}


def containers(overlay: str) -> Iterator[tuple[str, Object]]:
    for _, pod in pods(overlay):
        for container in [*pod["containers"], *pod.get("initContainers", ())]:
            yield container["image"], container


def environment(overlay: str, container: Object) -> dict[str, str]:
    """What of ours its process finds."""
    given = {each["name"]: each["value"] for each in container.get("env", ()) if each["name"] != "PROTOCOL"}
    for source in container.get("envFrom", ()):
        (config,) = found(overlay, "ConfigMap", source["configMapRef"]["name"])
        given |= config["data"]
    return given


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_schemas_take_every_object(overlay: str) -> None:
    for each in rendered(overlay):
        if (kind := DEFINED.get(each["kind"])) is not None:
            known = kind.model_validate(each).model_dump(mode="json", by_alias=True, exclude_unset=True)
            assert known == each, "a field that the operator does not know"
        elif each["kind"] != "InferenceService":
            kubernetes_validate.validate(each, VERSION, strict=True)


@pytest.mark.parametrize("overlay", KSERVE)
def test_what_kserve_makes_a_pod_of_is_one(overlay: str) -> None:
    for name, pod in pods(overlay):
        each = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": pod}
        kubernetes_validate.validate(each, VERSION, strict=True)
        (container,) = pod["containers"]
        assert container["name"] == "kserve-container"
        assert {"name": "PROTOCOL", "value": "v2"} in container["env"]


def test_a_transformer_starts_with_the_arguments_that_kserve_appends() -> None:
    ((name, pod),) = pods("overlays/kserve-transformer")
    (container,) = pod["containers"]
    module, *given = container["args"]
    assert module == "service.transformer"
    appended = ["--model_name", name, "--predictor_host", f"{name}-predictor.clarifier"]
    settings = Settings.model_validate(settings_of([*given, *appended]))
    assert settings.predictor_url == f"http://{name}-predictor.clarifier"
    assert settings.port == container["ports"][0]["containerPort"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_everything_is_in_one_namespace_that_restricts_its_pods(overlay: str) -> None:
    (namespace,) = found(overlay, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    others = (each for each in rendered(overlay) if each is not namespace)
    assert {each["metadata"]["namespace"] for each in others} == {namespace["metadata"]["name"]}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_are_as_restricted_says_and_more(overlay: str) -> None:
    for name, pod in pods(overlay):
        assert not pod["automountServiceAccountToken"], name
        security = pod["securityContext"]
        assert security["runAsNonRoot"]
        assert security["runAsUser"] > 0
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not any("hostPath" in volume for volume in pod.get("volumes", ()))
    for image, container in containers(overlay):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        resources = container["resources"]
        assert resources["limits"]["memory"] == resources["requests"]["memory"], image
        assert "cpu" in resources["requests"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_images_are_ours_or_those_of_compose(overlay: str) -> None:
    theirs = {service["image"] for service in COMPOSE["services"].values()}
    for image, container in containers(overlay):
        assert image in (*OURS, *theirs)
        if image in OURS:
            assert image.partition(":")[2] in STAGES
            assert find_spec(container["args"][0])
    users = {pod["securityContext"]["runAsUser"] for name, pod in pods(overlay) if name != "redis"}
    assert users == {int(said("cpu", "USER")[-1].partition(":")[0])}


@pytest.mark.parametrize("overlay", [*SERVING, *KSERVE])
def test_every_name_of_the_environment_is_a_setting(overlay: str) -> None:
    for image, container in containers(overlay):
        given = environment(overlay, container)
        assert bool(given) == (image in OURS)
        assert all(key.startswith(PREFIX) for key in given)
        fields: dict[str, Any] = {key.removeprefix(PREFIX).lower(): value for key, value in given.items()}
        secret = fields.pop("redis_password_file", None)
        Settings.model_validate(fields)
        if secret is not None:
            (place,) = (mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "redis")
            (keys,) = (each["data"] for each in found(overlay, "Secret"))
            assert {f"{place}/{key}" for key in keys} == {secret}


@pytest.mark.parametrize("overlay", [*SERVING, *KSERVE])
def test_probes_ask_routes_that_are_there_on_a_port_that_is(overlay: str) -> None:
    app = create_app(Settings())
    paths = set(app.openapi()["paths"])
    for image, container in containers(overlay):
        if image not in OURS:
            continue
        ports = {port.get("name"): port["containerPort"] for port in container["ports"]}
        given = environment(overlay, container)
        assert set(ports.values()) == {int(given.get(f"{PREFIX}WORKER_PORT", "8000"))}
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            asked = container[probe]["httpGet"]
            assert asked["path"] in paths
            assert asked["port"] in ports or asked["port"] in ports.values()
        assert container["livenessProbe"]["httpGet"]["path"].endswith(("/livez", "/live"))


@pytest.mark.parametrize("overlay", [*SERVING, *KSERVE])
def test_a_pod_may_end_before_it_is_killed(overlay: str) -> None:
    for name, pod in pods(overlay):
        if name == "redis":
            continue
        (container,) = pod["containers"]
        given = environment(overlay, container)
        settings = Settings()
        delay = float(given.get(f"{PREFIX}DRAIN_DELAY_S", settings.drain_delay_s))
        drain = float(given.get(f"{PREFIX}DRAIN_TIMEOUT_S", settings.drain_timeout_s))
        sleep = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        assert pod["terminationGracePeriodSeconds"] > sleep + delay + drain


@pytest.mark.parametrize("overlay", SERVING)
def test_gateways_and_workers_are_scaled_apart_and_not_all_taken_at_once(overlay: str) -> None:
    for name in ("gateway", "worker"):
        (deployment,) = found(overlay, "Deployment", name)
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        (budget,) = found(overlay, "PodDisruptionBudget", name)
        assert budget["spec"]["maxUnavailable"] == 1
        assert budget["spec"]["selector"]["matchLabels"].items() <= labels.items()
        scaled = found(overlay, "ScaledObject", name)
        assert bool(scaled) == (overlay == "overlays/keda")
        assert ("replicas" in deployment["spec"]) != bool(scaled)
        for each in scaled:
            assert each["spec"]["scaleTargetRef"] == {"name": name}
            assert each["spec"]["minReplicaCount"] >= 1
            behavior = each["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
            assert behavior["scaleDown"]["stabilizationWindowSeconds"] >= 300


@pytest.mark.parametrize("overlay", SERVING)
def test_the_service_and_the_monitor_find_their_pods(overlay: str) -> None:
    for name in ("gateway", "redis"):
        (service,) = found(overlay, "Service", name)
        (maker,) = [*found(overlay, "Deployment", name), *found(overlay, "StatefulSet", name)]
        assert service["spec"]["selector"].items() <= maker["spec"]["template"]["metadata"]["labels"].items()
    (monitor,) = found(overlay, "PodMonitor")
    (expression,) = monitor["spec"]["selector"]["matchExpressions"]
    assert expression["values"] == ["gateway", "worker"]
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["path"] == "/metrics"
    (relabeling,) = endpoint["relabelings"]
    assert relabeling["sourceLabels"] == ["__meta_kubernetes_pod_label_app_kubernetes_io_component"]
    jobs = {relabeling["replacement"].replace("$1", name) for name in expression["values"]}
    prometheus = yaml.safe_load((ROOT / "monitoring/prometheus/prometheus.yml").read_text())
    assert jobs < {job["job_name"] for job in prometheus["scrape_configs"]}
    for name in expression["values"]:
        (deployment,) = found(overlay, "Deployment", name)
        assert deployment["spec"]["template"]["metadata"]["labels"][expression["key"]] == name
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        assert endpoint["port"] in [port["name"] for port in container["ports"]]


@pytest.mark.parametrize("overlay", SERVING)
def test_what_no_policy_allows_is_denied(overlay: str) -> None:
    policies = {each["metadata"]["name"]: each["spec"] for each in found(overlay, "NetworkPolicy")}
    assert policies["deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    (from_prometheus,) = policies["worker"]["ingress"]
    assert from_prometheus["from"][0]["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "prometheus"}
    everywhere = [name for name, spec in policies.items() for rule in spec.get("egress", ()) if "to" not in rule]
    assert not everywhere


def test_a_gpu_is_asked_for_by_workers_alone() -> None:
    limits = {image: container["resources"]["limits"] for image, container in containers("overlays/gpu")}
    assert [image for image, limit in limits.items() if "nvidia.com/gpu" in limit] == ["clarifier:cuda"]
    (worker,) = (container for image, container in containers("overlays/gpu") if image == "clarifier:cuda")
    assert environment("overlays/gpu", worker)[f"{PREFIX}DEVICE"] == "cuda"


def test_the_rules_are_those_of_prometheus() -> None:
    assert yaml.safe_load(WRITTEN.read_text()) == prometheus_rule()
    names = [group["name"] for group in prometheus_rule()["spec"]["groups"]]
    assert len(set(names)) == len(names)


def test_training_runs_as_its_command_says() -> None:
    ((_, job),) = pods("training")
    (container,) = job["containers"]
    module = container["args"].index("--module")
    assert container["args"][module + 1] == "training"
    recipe = dict(pair.split("=") for pair in container["args"] if pair.startswith("--recipe="))["--recipe"]
    assert (ROOT / recipe).is_file()
    assert json.loads(said("training", "ENTRYPOINT")[-1]) == ["python", "-m"]
    places = {volume["mountPath"] for volume in container["volumeMounts"]}
    assert {"/data", "/app/runs"} <= places
