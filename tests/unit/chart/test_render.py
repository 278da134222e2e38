"""What `helm template` makes of the chart: exactly these objects, and the default render word for word."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "chart-default.yaml"
CRD = ("CustomResourceDefinition", "finetunejobs.finetune-operator.io")
BASE = {
    ("ServiceAccount", "finetune-operator"),
    ("ConfigMap", "finetune-operator"),
    ("Deployment", "finetune-operator"),
    ("ClusterRole", "finetune-operator"),
    ("Role", "finetune-operator"),
    ("RoleBinding", "finetune-operator-own"),
}
CLUSTER_WIDE = {("ClusterRoleBinding", "finetune-operator")}
CLUSTER_ROLE = {("ClusterRole", "finetune-operator-cluster"), ("ClusterRoleBinding", "finetune-operator-cluster")}
PROGRESS = {("Service", "finetune-operator-progress"), ("Secret", "finetune-operator-tls")}
METRICS = {("Service", "finetune-operator-metrics")}
NETWORK = {("NetworkPolicy", "finetune-operator")}
MONITORING = {
    "serviceMonitor": ("ServiceMonitor", "finetune-operator"),
    "rules": ("PrometheusRule", "finetune-operator"),
    "dashboard": ("ConfigMap", "finetune-operator-dashboard"),
}
AGGREGATED = {("ClusterRole", "finetune-operator-view"), ("ClusterRole", "finetune-operator-edit")}
EVERYTHING = {CRD} | BASE | CLUSTER_WIDE | CLUSTER_ROLE | PROGRESS | METRICS | NETWORK | AGGREGATED


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        pytest.param([], EVERYTHING, id="the defaults install everything, bound cluster-wide"),
        pytest.param(["crds.install=false"], EVERYTHING - {CRD}, id="the definition can be left to somebody else"),
        pytest.param(["progress.enabled=false"], EVERYTHING - PROGRESS, id="progress can be left out"),
        pytest.param(["networkPolicy.enabled=false"], EVERYTHING - NETWORK, id="the network policy can be left out"),
        pytest.param(["metrics.enabled=false"], EVERYTHING - METRICS, id="metrics can be left out"),
        pytest.param(
            ["replicaCount=2"], EVERYTHING | {("PodDisruptionBudget", "finetune-operator")}, id="two pods have a budget"
        ),
        pytest.param(
            [f"metrics.{part}.enabled=true" for part in MONITORING],
            EVERYTHING | set(MONITORING.values()),
            id="monitoring is added by three switches",
        ),
        pytest.param(
            ["metrics.enabled=false", *(f"metrics.{part}.enabled=true" for part in MONITORING)],
            EVERYTHING - METRICS,
            id="without metrics there is nothing to monitor",
        ),
        pytest.param(["rbac.aggregate=false"], EVERYTHING - AGGREGATED, id="people's roles can be left out"),
        pytest.param(
            ["serviceAccount.create=false", "serviceAccount.name=given"],
            EVERYTHING - {("ServiceAccount", "finetune-operator")},
            id="a service account that exists is used",
        ),
        pytest.param(
            ["watchNamespaces={research}"],
            (EVERYTHING - CLUSTER_WIDE) | {("RoleBinding", "finetune-operator")},
            id="namespaces named: bound there, not cluster-wide",
        ),
        pytest.param(
            ["watchNamespaces={research}", "progress.enabled=false"],
            (EVERYTHING - CLUSTER_WIDE - CLUSTER_ROLE - PROGRESS) | {("RoleBinding", "finetune-operator")},
            id="namespaces named and no progress: nothing cluster-wide is left",
        ),
    ],
)
def test_objects_are_exactly_these(render: Any, arguments: list[str], expected: set[tuple[str, str]]) -> None:
    sets = [part for argument in arguments for part in ("--set", argument)]
    found = [(manifest["kind"], manifest["metadata"]["name"]) for manifest in render(*sets)]
    assert set(found) == expected
    assert len(found) == len(expected)


def test_golden_default_render_is_the_reviewed_one(render: Any) -> None:
    manifests = render("--set", "crds.install=false")
    manifests.sort(key=lambda manifest: (manifest["kind"], manifest["metadata"]["name"]))
    text = yaml.safe_dump_all(manifests, sort_keys=True, width=120)
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8"), "the default render changed; `make golden`, and review the diff"


def find(manifests: list[dict[str, Any]], kind: str, name: str = "finetune-operator") -> dict[str, Any]:
    """The one object of this kind and name."""
    (found,) = [m for m in manifests if (m["kind"], m["metadata"]["name"]) == (kind, name)]
    return found


@pytest.mark.parametrize("replicas", [1, 2])
def test_an_upgrade_starts_the_new_pod_before_it_ends_the_old_one(render: Any, replicas: int) -> None:
    spec = find(render("--set", f"replicaCount={replicas}"), "Deployment")["spec"]
    assert spec["replicas"] == replicas
    assert spec["strategy"] == {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}


def test_probes_ask_for_life_and_for_readiness(render: Any) -> None:
    (container,) = find(render(), "Deployment")["spec"]["template"]["spec"]["containers"]
    asked = {name: probe["httpGet"] for name, probe in container.items() if name.endswith("Probe")}
    assert asked == {
        "startupProbe": {"path": "/healthz", "port": "health"},
        "livenessProbe": {"path": "/healthz", "port": "health"},
        "readinessProbe": {"path": "/readyz", "port": "health"},
    }


def test_two_pods_keep_apart_where_they_can(render: Any) -> None:
    pod = find(render("--set", "replicaCount=2"), "Deployment")["spec"]["template"]
    spread = pod["spec"]["topologySpreadConstraints"]
    assert [each["topologyKey"] for each in spread] == ["kubernetes.io/hostname", "topology.kubernetes.io/zone"]
    for each in spread:
        assert each["whenUnsatisfiable"] == "ScheduleAnyway"
        assert each["labelSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert "topologySpreadConstraints" not in find(render(), "Deployment")["spec"]["template"]["spec"]
    given = render("--set", "replicaCount=2", "--set-json", 'affinity={"nodeAffinity":{}}')
    assert "topologySpreadConstraints" not in find(given, "Deployment")["spec"]["template"]["spec"]


def test_a_change_of_any_value_that_the_operator_reads_starts_new_pods(render: Any) -> None:
    def checksum(*arguments: str) -> str:
        template = find(render(*arguments), "Deployment")["spec"]["template"]
        return str(template["metadata"]["annotations"]["checksum/config"])

    default = checksum()
    for value in (
        "hang.seconds=1",
        "featureGates.Cuda=true",
        "stages.train.resources.requests.cpu=2",
        "nodes.watch=false",
    ):
        assert checksum("--set", value) != default
    assert checksum("--set", "podAnnotations.a=b") == default


def test_selectors_find_the_pods(render: Any) -> None:
    manifests = render("--set", "replicaCount=2")
    labels = find(manifests, "Deployment")["spec"]["template"]["metadata"]["labels"]
    selectors = [
        find(manifests, "Deployment")["spec"]["selector"]["matchLabels"],
        find(manifests, "Service", "finetune-operator-progress")["spec"]["selector"],
        find(manifests, "Service", "finetune-operator-metrics")["spec"]["selector"],
        find(manifests, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        find(manifests, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
    ]
    for selector in selectors:
        assert selector
        assert selector.items() <= labels.items()


def test_services_lead_to_ports_of_the_pods(render: Any) -> None:
    manifests = render("--set", "progress.port=9443")
    (container,) = find(manifests, "Deployment")["spec"]["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"health": 8080, "progress": 9443}
    services = [m for m in manifests if m["kind"] == "Service"]
    assert {port["targetPort"] for service in services for port in service["spec"]["ports"]} == set(ports)


def test_network_policy_lets_in_what_is_served_and_out_what_is_needed(render: Any) -> None:
    policy = find(
        render("--set", "progress.port=9443", "--set", "networkPolicy.apiServerPorts={8443}"), "NetworkPolicy"
    )
    spec = policy["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    assert spec["ingress"] == [
        {"ports": [{"port": 8080, "protocol": "TCP"}]},
        {"from": [{"namespaceSelector": {}}], "ports": [{"port": 9443, "protocol": "TCP"}]},
    ]
    assert spec["egress"] == [
        {"ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]},
        {"to": [{"podSelector": spec["podSelector"]}], "ports": [{"port": 9443, "protocol": "TCP"}]},
        {"ports": [{"port": 8443, "protocol": "TCP"}]},
    ]


def test_network_policy_without_progress_has_no_rule_for_it(render: Any) -> None:
    spec = find(render("--set", "progress.enabled=false"), "NetworkPolicy")["spec"]
    assert [rule["ports"][0]["port"] for rule in spec["ingress"]] == [8080]
    assert [rule["ports"][0]["port"] for rule in spec["egress"]] == [53, 443]


def test_operator_pod_meets_the_restricted_pod_security_standard(render: Any) -> None:
    pod = find(render(), "Deployment")["spec"]["template"]["spec"]
    assert pod["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 65532,
        "runAsGroup": 65532,
        "fsGroup": 65532,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    for container in pod["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
    assert {next(iter(set(volume) - {"name"})) for volume in pod["volumes"]} <= {"configMap", "emptyDir", "secret"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)


@pytest.mark.parametrize(
    ("tag", "reference"),
    [
        pytest.param("", "registry.test/op:0.1.0", id="no tag is the chart's appVersion"),
        pytest.param("a1b2", "registry.test/op:a1b2", id="a tag follows a colon"),
        pytest.param(f"sha256:{'0' * 64}", f"registry.test/op@sha256:{'0' * 64}", id="a digest follows an at sign"),
    ],
)
def test_image_reference(render: Any, tag: str, reference: str) -> None:
    deployment = next(m for m in render("--set", f"images.operator.tag={tag}") if m["kind"] == "Deployment")
    assert deployment["spec"]["template"]["spec"]["containers"][0]["image"] == reference


@pytest.mark.parametrize("image", ["operator", "trainer"])
def test_missing_repository_is_named_with_its_remedy(helm_template: Any, image: str) -> None:
    other = "trainer" if image == "operator" else "operator"
    done = helm_template("--set", f"images.{other}.repository=registry.test/x")
    assert done.returncode != 0
    assert f"--set images.{image}.repository=<registry>/finetune-{image}" in done.stderr


@pytest.mark.parametrize("release", ["short", "a-release-name-that-is-as-long-as-helm-allows-here"])
def test_names_fit_in_a_label(helm: str, release: str, chart: Path) -> None:
    command = [helm, "template", release, str(chart), "--kube-version", "1.34.4"]
    for image in ("operator", "trainer"):
        command += ["--set", f"images.{image}.repository=registry.test/x"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    for manifest in yaml.safe_load_all(done.stdout):
        if manifest["kind"] != "CustomResourceDefinition":
            assert len(manifest["metadata"]["name"]) <= 63
            assert manifest["metadata"]["name"].startswith(release[:20])
