"""What manifests must be beyond their schemas: safe and complete."""

import pathlib
import re
import tomllib

import packaging.specifiers
import pytest

from tests.conftest import ROOT
from tests.k8s.manifests import OVERLAYS, Object, clusters, of_kind, one, pods, ray_pods, render, walk

# What docs/kubernetes.md has a person make, and what Strimzi makes.
SECRETS = {"grstream-ray-token", "grstream-api-keys", "grstream-redis"}
STRIMZI = {"grstream", "grstream-cluster-ca-cert"}
HEAD_LENGTH = 47  # of the name of what owns a Ray cluster, or KubeRay refuses it

overlays = pytest.mark.parametrize("overlay", OVERLAYS)


def named(objects: list[Object], *keys: str) -> set[str]:
    """What is named below any of these keys."""
    found = set()
    for path, value in walk(objects):
        if isinstance(value, dict) and path.rpartition(".")[2] in keys:
            found |= {value[field] for field in ("name", "secretName", "claimName") if field in value}
    return found


# -- safe ---------------------------------------------------------------------------------------------------


@overlays
def test_no_secret_is_in_the_tree(overlay: str) -> None:
    objects = render(overlay)
    assert not of_kind(objects, "Secret")
    for pod in pods(objects):
        for container in pod.containers:
            for variable in container.get("env", []):
                secret = re.search(r"(?i)token|password|api_keys", variable["name"])
                assert not (secret and "value" in variable), f"{pod.where}: {variable['name']}"


@overlays
def test_every_image_is_of_a_version(overlay: str) -> None:
    for pod in pods(render(overlay)):
        for container in pod.containers:
            name, _, tag = container["image"].rpartition(":")
            assert name, f"{pod.where}: {container['image']}"
            assert re.match(r"\d+\.\d+\.\d+", tag), f"{pod.where}: {container['image']}"


@overlays
def test_every_pod_runs_as_somebody_and_may_do_nothing_more(overlay: str) -> None:
    for pod in pods(render(overlay)):
        context = pod.spec["securityContext"]
        assert context["runAsNonRoot"] is True, pod.where
        assert context["runAsUser"] > 0, pod.where
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, pod.where
        assert pod.spec["enableServiceLinks"] is False, pod.where
        for container in pod.containers:
            confined = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
            assert container["securityContext"] == confined, pod.where


@overlays
def test_a_token_for_kubernetes_goes_to_the_head_that_has_an_autoscaler_alone(overlay: str) -> None:
    objects = render(overlay)
    scaled = {
        f"{o['kind']}/{o['metadata']['name']} head"
        for o in [*of_kind(objects, "RayService"), *of_kind(objects, "RayJob")]
        for cluster in clusters(o)
        if cluster.get("enableInTreeAutoscaling")
    }
    assert {p.where for p in pods(objects) if p.spec["automountServiceAccountToken"] is not False} == scaled


@overlays
def test_every_container_says_what_it_takes(overlay: str) -> None:
    objects = render(overlay)
    told = [(pod.where, c["resources"]) for pod in pods(objects) for c in pod.containers]
    for o in objects:
        told += [
            (path, value) for path, value in walk(o) if re.search(r"(Operator|Options)\.resources$", path)
        ]
        if o["kind"] == "KafkaNodePool":
            told.append((o["metadata"]["name"], o["spec"]["resources"]))
    for where, resources in told:
        for field in ("requests", "limits"):
            assert {"cpu", "memory"} <= set(resources[field]), where
        # What is taken beyond a request is taken back at the worst moment.
        assert resources["requests"]["memory"] == resources["limits"]["memory"], where


def test_nobody_speaks_to_anybody_unless_it_is_said() -> None:
    everything = one(render("base"), "NetworkPolicy", "default-deny")["spec"]
    assert everything == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


# -- complete -----------------------------------------------------------------------------------------------


@overlays
def test_what_is_named_is_there(overlay: str) -> None:
    objects = render(overlay)
    [config] = [o["metadata"]["name"] for o in of_kind(objects, "ConfigMap") if "grstream.yaml" in o["data"]]
    assert re.fullmatch(r"grstream-[0-9a-z]{10}", config)  # the hash
    assert named(objects, "configMap", "configMapRef", "configMapKeyRef") == {config}
    claims = {o["metadata"]["name"] for o in of_kind(objects, "PersistentVolumeClaim")}
    assert named(objects, "persistentVolumeClaim") == claims
    accounts = {o["metadata"]["name"] for o in of_kind(objects, "ServiceAccount")}
    assert {pod.spec["serviceAccountName"] for pod in pods(objects)} <= accounts
    for pod in pods(objects):
        volumes = {volume["name"] for volume in pod.spec.get("volumes", [])}
        mounted = {m["name"] for c in pod.containers for m in c.get("volumeMounts", [])}
        claimed = {
            claim["metadata"]["name"]
            for o in of_kind(objects, "StatefulSet")
            for claim in o["spec"]["volumeClaimTemplates"]
        }
        assert volumes <= mounted <= volumes | claimed, pod.where


@overlays
def test_secrets_are_those_that_the_document_names(overlay: str) -> None:
    objects = render(overlay)
    used = named(objects, "secretKeyRef", "secret")
    used |= {c["authOptions"]["secretName"] for o in objects if "spec" in o for c in clusters(o)}
    strimzi = {
        value["secret"]["name"] for _, value in walk(objects) if isinstance(value, dict) and "secret" in value
    }
    assert strimzi == STRIMZI
    assert used - strimzi <= SECRETS
    text = (ROOT / "docs" / "kubernetes.md").read_text()
    assert [name for name in used if f"`{name}`" not in text and f"generic {name} " not in text] == []


@overlays
def test_every_selector_selects_a_pod(overlay: str) -> None:
    """A label with a typo is a policy that allows nothing, or a budget that protects nothing."""
    objects = render(overlay)
    known = [pod.labels for pod in pods(objects)]
    pools = [o["metadata"]["name"] for o in of_kind(objects, "KafkaNodePool")]
    for name in of_kind(objects, "Kafka"):
        cluster = name["metadata"]["name"]
        known += [
            {
                "strimzi.io/cluster": cluster,
                "strimzi.io/name": f"{cluster}-kafka",
                "strimzi.io/pool-name": pool,
            }
            for pool in pools
        ]
        known.append({"strimzi.io/cluster": cluster, "strimzi.io/name": f"{cluster}-entity-operator"})
    known.append({"gateway.networking.k8s.io/gateway-name": "grstream-gateway"})  # as the Gateway API has it
    known.append({"app.kubernetes.io/name": "kuberay-operator"})  # as KubeRay's chart has it
    for o in objects:
        for path, selector in walk(o):
            if re.search(r"(podSelector|labelSelector|spec\.selector)$", path) and isinstance(selector, dict):
                assert any(selects(selector, labels) for labels in known), f"{o['metadata']['name']}{path}"


def selects(selector: Object, labels: dict[str, str]) -> bool:
    wanted = (
        selector
        if not {"matchLabels", "matchExpressions"} & set(selector)
        else selector.get("matchLabels", {})
    )
    for expression in selector.get("matchExpressions", []):
        held = labels.get(expression["key"])
        if held is None or (expression["operator"] == "In" and held not in expression["values"]):
            return False
    return all(labels.get(key) == value for key, value in wanted.items())


@overlays
def test_the_trainer_is_submitted_once(overlay: str) -> None:
    """By a RayJob, or by a Deployment to the head service of the RayService."""
    objects = render(overlay)
    service, job = one(objects, "RayService"), of_kind(objects, "RayJob")
    keepers = [c for o in of_kind(objects, "Deployment") for c in o["spec"]["template"]["spec"]["containers"]
               if "jobs.keep_training" in c["command"]]  # fmt: skip
    assert len(job) + len(keepers) == 1
    for keeper in keepers:
        address = keeper["command"][keeper["command"].index("--address") + 1]
        assert address == f"http://{service['metadata']['name']}-head-svc:8265"


@overlays
def test_clusters_are_such_as_kuberay_takes(overlay: str) -> None:
    """Its rules beyond the schema (validation.go of KubeRay 1.6)."""
    objects = render(overlay)
    required = packaging.specifiers.SpecifierSet(pinned_range("ray"))
    for o in [*of_kind(objects, "RayService"), *of_kind(objects, "RayJob")]:
        assert len(o["metadata"]["name"]) <= HEAD_LENGTH
        [cluster] = clusters(o)
        assert cluster["rayVersion"] in required
        assert cluster["authOptions"]["mode"] == "token"
        scaled = cluster.get("enableInTreeAutoscaling", False)
        for pod in ray_pods([o]):
            assert not (scaled and "restartPolicy" in pod.spec), pod.where
            names = {port.get("name") for port in pod.spec["containers"][0]["ports"]}
            assert "serve" in names or o["kind"] == "RayJob", pod.where
        for group in cluster.get("workerGroupSpecs", []):
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
            assert not (group["rayStartParams"] and group.get("resources"))
    upgrade = one(objects, "RayService")["spec"]["upgradeStrategy"]
    if upgrade["type"] == "NewClusterWithIncrementalUpgrade":
        options = upgrade["clusterUpgradeOptions"]
        assert 0 < options["stepSizePercent"] <= options["maxSurgePercent"] <= 100
        assert one(objects, "RayService")["spec"]["rayClusterConfig"]["enableInTreeAutoscaling"]
    for job in of_kind(objects, "RayJob"):
        assert job["spec"]["backoffLimit"] > 0
        assert "clusterSelector" not in job["spec"]
        assert job["spec"]["shutdownAfterJobFinishes"]


def pinned_range(name: str) -> str:
    """What pyproject.toml asks of a distribution."""
    project = tomllib.loads((pathlib.Path(ROOT) / "pyproject.toml").read_text())["project"]
    [found] = [r for r in project["dependencies"] if re.match(rf"{name}\b", r)]
    return re.sub(rf"^{name}(\[[^\]]*\])?", "", found)
