"""The manifests follow Kubernetes' schemas, and fit each other."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
OURS = {"Deployment", "Service", "PersistentVolumeClaim", "HorizontalPodAutoscaler"}
OURS |= {"NetworkPolicy", "PodDisruptionBudget"}
OPERATORS = {"ServiceMonitor", "PrometheusRule"}


@pytest.fixture(scope="module")
def manifests():
    """By kind, as they are before kustomize."""
    base = KUBERNETES / "base"
    names = yaml.safe_load((base / "kustomization.yaml").read_text())["resources"]
    found = [yaml.safe_load((base / name).read_text()) for name in names if name.endswith(".yaml")]
    return {manifest["kind"]: manifest for manifest in found}


def test_kubernetes_schemas_take_them(manifests):
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    assert manifests.keys() == OURS | OPERATORS
    for kind in OURS:
        kubernetes_validate.validate(manifests[kind], "1.37", strict=True)


def test_the_schemas_take_the_ingress_which_is_not_applied(manifests):
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    ingress = yaml.safe_load((KUBERNETES / "ingress.yaml").read_text())
    kubernetes_validate.validate(ingress, "1.37", strict=True)
    (path,) = ingress["spec"]["rules"][0]["http"]["paths"]
    service = manifests["Service"]
    assert path["path"] == "/v1"
    assert path["backend"]["service"]["name"] == service["metadata"]["name"]
    assert path["backend"]["service"]["port"]["name"] in {port["name"] for port in service["spec"]["ports"]}
    # As the proxy of compose.yaml does it.
    proxy = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["proxy"]["environment"]
    annotations = ingress["metadata"]["annotations"]
    for name, annotation in (("MAX_BODY", "client-max-body-size"), ("READ_TIMEOUT", "proxy-read-timeout")):
        assert f"{{PROXY_{name}:-{annotations[f'nginx.org/{annotation}']}}}" in proxy[f"PROXY_{name}"]
    assert annotations["nginx.org/proxy-buffering"] == "false"


def test_the_schemas_refuse_a_misspelt_field(manifests):
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    wrong = {**manifests["Service"], "spec": {**manifests["Service"]["spec"], "selectors": {}}}
    with pytest.raises(kubernetes_validate.ValidationError, match="selectors"):
        kubernetes_validate.validate(wrong, "1.37", strict=True)


@pytest.mark.parametrize("kind", sorted(OPERATORS))
def test_the_prometheus_operators_models_take_them(manifests, kind):
    operator = pytest.importorskip("cloudcoil.models.prometheus_operator.v1")
    model = getattr(operator, kind).model_validate(manifests[kind])
    # The models drop fields that they do not know: nothing may be missing.
    assert model.model_dump(by_alias=True, exclude_unset=True, mode="json") == manifests[kind]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl, for its kustomize")
@pytest.mark.parametrize(("overlay", "gpus"), [("cpu", None), ("cuda", "1")])
def test_kustomize_builds_the_overlays(overlay, gpus):
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    command = ["kubectl", "kustomize", str(KUBERNETES / overlay)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    found = {manifest["kind"]: manifest for manifest in yaml.safe_load_all(built.stdout)}
    assert found.keys() == OURS | OPERATORS | {"ConfigMap"}
    for kind in OURS | {"ConfigMap"}:
        kubernetes_validate.validate(found[kind], "1.37", strict=True)
    (container,) = found["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert container["image"] == f"pifa-vllm:{overlay}"
    assert container["resources"]["limits"].get("nvidia.com/gpu") == gpus
    assert set(found["ConfigMap"]["data"]) == {"overview.json", "memory.json", "compression.json"}


def test_they_fit_each_other(manifests):
    deployment, service = manifests["Deployment"], manifests["Service"]
    pod = deployment["spec"]["template"]
    labels = pod["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"] == labels
    assert manifests["ServiceMonitor"]["spec"]["selector"]["matchLabels"] == service["metadata"]["labels"]
    (container,) = pod["spec"]["containers"]
    ports = {port["name"] for port in container["ports"]}
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    assert {e["port"] for e in manifests["ServiceMonitor"]["spec"]["endpoints"]} <= {
        port["name"] for port in service["spec"]["ports"]
    }
    probes = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")}
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startup": "/health",
        "liveness": "/health",
        "readiness": "/ready",
    }
    assert {probe["port"] for probe in probes.values()} <= ports
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes.keys()
    claim = volumes["model"]["persistentVolumeClaim"]["claimName"]
    assert claim == manifests["PersistentVolumeClaim"]["metadata"]["name"]


def test_the_key_comes_from_the_secret_that_prometheus_reads(manifests):
    (container,) = manifests["Deployment"]["spec"]["template"]["spec"]["containers"]
    (source,) = [entry["valueFrom"] for entry in container["env"] if entry["name"] == "VLLM_API_KEY"]
    (endpoint,) = manifests["ServiceMonitor"]["spec"]["endpoints"]
    # Without the Secret no pod starts.
    assert source == {"secretKeyRef": endpoint["authorization"]["credentials"]}


def test_only_the_ingress_and_prometheus_reach_the_pods(manifests):
    policy = manifests["NetworkPolicy"]["spec"]
    labels = manifests["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert policy["podSelector"]["matchLabels"] == labels
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    assert policy["egress"] == []
    (rule,) = policy["ingress"]
    (container,) = manifests["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert [port["port"] for port in rule["ports"]] == [port["name"] for port in container["ports"]]


def test_a_rollout_and_a_lost_pod_are_no_outage(manifests):
    deployment = manifests["Deployment"]["spec"]
    assert deployment["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    assert manifests["HorizontalPodAutoscaler"]["spec"]["minReplicas"] >= 2
    budget = manifests["PodDisruptionBudget"]["spec"]
    assert budget["selector"] == deployment["selector"]
    assert budget["maxUnavailable"] == 1


def test_a_pod_has_time_to_drain_and_a_hung_one_is_started_anew_within_a_minute(manifests):
    pod = manifests["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    before = int(container["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert pod["terminationGracePeriodSeconds"] >= before + 30 + 15  # with the server's --shutdown-timeout
    # Until an endpoint that is not ready is out of the way.
    readiness, liveness = container["readinessProbe"], container["livenessProbe"]
    assert readiness["periodSeconds"] * readiness["failureThreshold"] <= before
    # Without tokens, one is asked for after 15 s; /health fails after 30 s more.
    assert 45 + liveness["periodSeconds"] * liveness["failureThreshold"] <= 60
    loads = container["startupProbe"]["periodSeconds"] * container["startupProbe"]["failureThreshold"]
    assert manifests["Deployment"]["spec"]["progressDeadlineSeconds"] > loads


def test_nothing_runs_as_root(manifests):
    security = manifests["Deployment"]["spec"]["template"]["spec"]["securityContext"]
    assert security["runAsNonRoot"] is True
    assert {security[name] for name in ("runAsUser", "runAsGroup", "fsGroup")} == {10001}


def test_the_autoscaler_asks_for_what_the_adapter_offers(manifests):
    spec = manifests["HorizontalPodAutoscaler"]["spec"]
    assert spec["scaleTargetRef"]["name"] == manifests["Deployment"]["metadata"]["name"]
    assert "replicas" not in manifests["Deployment"]["spec"]  # it would undo the autoscaler's at every apply
    (rule,) = yaml.safe_load((KUBERNETES / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    assert spec["metrics"][0]["pods"]["metric"]["name"] == rule["name"]["as"]
