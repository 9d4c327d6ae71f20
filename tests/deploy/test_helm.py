"""The chart, rendered by Helm's SDK and checked against Kubernetes' schemas. No cluster is needed.

The schemas do not cover ServiceMonitor, PrometheusRule and ScaledObject; single tests check their fields.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml

from rtap_server.http.api_keys import KeyRing
from rtap_server.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "rtap"
RULES = ROOT / "deploy" / "prometheus" / "rules"
OPERATORS = {"ServiceMonitor", "PrometheusRule", "ScaledObject"}
EVERYTHING: dict[str, Any] = {
    "model": "org/policy",
    "confidenceModel": "org/generator",
    "flags": ["--tensor-parallel-size", "2"],
    "env": [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}],
    "apiKeys": {"existingSecret": "rtap-keys"},
    "autoscaling": {"enabled": True},
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "prometheusRule": {"enabled": True},
    "networkPolicy": {"egress": [{"ports": [{"protocol": "TCP", "port": 443}]}]},
    "cache": {"existingClaim": "models"},
    "podLabels": {"team": "reasoning"},
    "podAnnotations": {"note": "x"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
    "nodeSelector": {"gpu": "yes"},
    "resources": {"limits": {"nvidia.com/gpu": 2}},
}


def render(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Objects by kind, as an install would send them."""
    with helm_python.Chart.load(CHART) as chart:
        files = chart.render(dict(values), name="demo", namespace="prod")
    texts = [text for path, text in files.items() if path.endswith(".yaml")]
    objects = [found for text in texts for found in yaml.safe_load_all(text) if found]
    assert len({found["kind"] for found in objects}) == len(objects)
    return {found["kind"]: found for found in objects}


def pod(values: Mapping[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = render(values)["Deployment"]["spec"]["template"]["spec"]
    return spec


def server(values: Mapping[str, Any]) -> dict[str, Any]:
    (container,) = pod(values)["containers"]
    return container


def test_helm_finds_nothing_wrong() -> None:
    report = helm_python.lint(CHART, EVERYTHING, strict=True)
    assert [m["error"] for m in report["messages"]] == ["icon is recommended"]


@pytest.mark.parametrize("version", ["1.29", "1.34"])
@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_kubernetes_takes_every_object(values: dict[str, Any], version: str) -> None:
    objects = render(values)
    for found in objects.values():
        if found["kind"] not in OPERATORS:
            kubernetes_validate.validate(found, version, strict=True)
    assert (set(objects) & OPERATORS) == (OPERATORS if values else set())


@pytest.mark.parametrize(
    "wrong",
    [
        {"replica": 3},
        {"image": {"tag": "latest"}},
        {"flags": ["--port", "80"]},
        {"flags": ["--api-key=secret"]},
        {"env": [{"name": "RTAP_API_KEYS", "value": "secret"}]},
        {"drainSeconds": -1},
        {"marginSeconds": 0},
        {"preStopSeconds": 0},
        {"cache": {"size": "20"}},
        {"autoscaling": {"prometheusAddress": "prometheus"}},
    ],
    ids=str,
)
def test_invalid_values_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(helm_python.HelmError):
        render(wrong)


def test_max_replicas_below_min_replicas_are_refused() -> None:
    with pytest.raises(helm_python.HelmError, match="maxReplicas"):
        render({"autoscaling": {"enabled": True, "minReplicas": 5, "maxReplicas": 2}})


@pytest.mark.parametrize(
    "values", [{}, {"drainSeconds": 0}, {"preStopSeconds": 40, "drainSeconds": 600, "marginSeconds": 5}], ids=str
)
def test_a_pod_is_not_killed_before_it_has_slept_and_drained(values: dict[str, Any]) -> None:
    spec, container = pod(values), server(values)
    command, slept = container["lifecycle"]["preStop"]["exec"]["command"]
    drained = container["args"][container["args"].index("--drain-seconds") + 1]
    assert command == "sleep"
    assert spec["terminationGracePeriodSeconds"] > int(slept) + int(drained)


def test_probes_ask_the_right_question() -> None:
    container = server({"startupSeconds": 901})
    startup, ready, live = (container[f"{name}Probe"] for name in ("startup", "readiness", "liveness"))
    assert startup["httpGet"]["path"] == ready["httpGet"]["path"] == "/ready"
    assert live["httpGet"]["path"] == "/live"
    assert startup["failureThreshold"] * startup["periodSeconds"] >= 901
    assert {probe["httpGet"]["port"] for probe in (startup, ready, live)} == {"http"}
    assert container["ports"] == [{"name": "http", "containerPort": 8000}]


def test_pods_are_locked_down() -> None:
    spec, container = pod(EVERYTHING), server(EVERYTHING)
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == 10001
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")} == {
        "/cache",
        "/tmp",
        "/dev/shm",
    }
    assert spec["enableServiceLinks"] is False


def test_keys_come_as_a_folder_from_a_secret_and_never_as_a_variable() -> None:
    values = {"apiKeys": {"existingSecret": "rtap-keys"}}
    container, (volume,) = server(values), [v for v in pod(values)["volumes"] if "secret" in v]
    (mount,) = [m for m in container["volumeMounts"] if m["name"] == volume["name"]]
    assert "subPath" not in mount  # Kubernetes never updates a file mounted by subPath
    file = container["args"][container["args"].index("--api-keys-file") + 1]
    assert Path(file).parent == Path(mount["mountPath"])
    assert Path(file).name in [item["path"] for item in volume["secret"]["items"]]
    assert "env" not in container


def test_every_flag_that_the_chart_sets_is_one_of_the_server() -> None:
    known = {f"--{name.replace('_', '-')}" for name in Settings.model_fields}
    given = [a for a in server({**EVERYTHING, "flags": []})["args"] if a.startswith("--")]
    assert set(given) <= known


def test_the_prometheus_operator_scrapes_the_service_with_the_metrics_key() -> None:
    objects = render(EVERYTHING)
    monitor, service = objects["ServiceMonitor"], objects["Service"]
    wanted = monitor["spec"]["selector"]["matchLabels"]
    assert wanted.items() <= service["metadata"]["labels"].items()
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] in [port["name"] for port in service["spec"]["ports"]]
    assert endpoint["authorization"]["credentials"] == {"name": "rtap-keys", "key": "metrics-key"}
    # rules and dashboard select jobs with rtap in their name
    assert service["metadata"]["labels"][monitor["spec"]["jobLabel"]] == "rtap"


def test_the_rules_are_those_of_prometheus() -> None:
    files = sorted(RULES.glob("*.yml"))
    assert files
    groups = [group for file in files for group in yaml.safe_load(file.read_text(encoding="utf-8"))["groups"]]
    assert render(EVERYTHING)["PrometheusRule"]["spec"]["groups"] == groups


def test_selectors_find_the_pods() -> None:
    objects = render(EVERYTHING)
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
    for wanted in (
        objects["Deployment"]["spec"]["selector"]["matchLabels"],
        objects["Service"]["spec"]["selector"],
        objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        objects["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ):
        assert wanted.items() <= labels


def test_keda_scales_the_deployment_on_the_queue_of_its_own_release() -> None:
    objects = render(EVERYTHING)
    scaled, deployment = objects["ScaledObject"]["spec"], objects["Deployment"]
    assert scaled["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert "replicas" not in deployment["spec"]  # a rollout would undo what KEDA decided
    (trigger,) = scaled["triggers"]
    service = objects["Service"]["metadata"]["name"]
    assert trigger["metadata"]["query"] == f'sum(vllm:num_requests_waiting{{namespace="prod", service="{service}"}})'
    assert trigger["metricType"] == "AverageValue"
    assert render({})["Deployment"]["spec"]["replicas"] == 2


def test_the_network_policy_admits_clients_and_prometheus_and_allows_dns_only() -> None:
    policy = render({})["NetworkPolicy"]["spec"]
    (way_in,), (way_out,) = policy["ingress"], policy["egress"]
    assert way_in["from"][0] == {"podSelector": {}}
    assert "monitoring" in str(way_in["from"][1])
    assert {port["port"] for port in way_out["ports"]} == {53}


def test_two_releases_share_no_names() -> None:
    with helm_python.Chart.load(CHART) as chart:
        first, second = (chart.render({}, name=name, namespace="prod") for name in ("one", "two"))
    named = [
        {
            yaml.safe_load(text)["metadata"]["name"]
            for path, text in files.items()
            if path.endswith(".yaml") and text.strip()
        }
        for files in (first, second)
    ]
    assert not named[0] & named[1]


def test_keys_of_make_keys_guard_metrics_under_the_charts_item_names(tmp_path: Path) -> None:
    """docs/deployment.md makes the Secret from the files of make_keys.py."""
    from deploy.compose.make_keys import main as make_keys

    assert make_keys(tmp_path / "secrets") == 0
    assert KeyRing((), tmp_path / "secrets" / "keys.toml").guards_metrics
    defaults = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))["apiKeys"]
    assert (defaults["key"], defaults["metricsKey"]) == ("keys.toml", "metrics-key")
