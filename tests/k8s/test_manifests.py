"""What manifests must be beyond their schemas: safe, complete, of one mind with the code that they run."""

import pathlib
import re
import tomllib
from collections.abc import Iterator
from typing import Any

import packaging.specifiers
import pytest
import yaml
from ray.serve._private.build_app import build_app
from ray.serve.schema import ServeDeploySchema

from grstream import config as configuration
from grstream.config import Config, KafkaConfig
from serve import app, proxy
from serve.middleware import Keyring
from tests.conftest import ROOT
from tests.k8s.manifests import OVERLAYS, Object, Pod, clusters, of_kind, one, pods, render, settings

# What docs/kubernetes.md has a person make, and what Strimzi makes.
SECRETS = {"grstream-ray-token", "grstream-api-keys", "grstream-redis"}
STRIMZI = {"grstream", "grstream-cluster-ca-cert"}
HEAD_LENGTH = 47  # of the name of what owns a Ray cluster, or KubeRay refuses it

WITH_KAFKA = ["overlays/gpu", "overlays/ha"]
overlays = pytest.mark.parametrize("overlay", OVERLAYS)


def parsed(overlay: str) -> Config:
    """The overlay's grstream YAML, as its pods will read it."""
    given = settings(render(overlay))
    if "security" not in KafkaConfig.model_fields:
        given["kafka"].pop("security", None)
    return configuration.parse(given, overlay)


def walk(o: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value below, with its path."""
    yield path, o
    inner = o.items() if isinstance(o, dict) else enumerate(o) if isinstance(o, list) else ()
    for key, value in inner:
        yield from walk(value, f"{path}.{key}")


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


@pytest.mark.parametrize("overlay", [o for o in OVERLAYS if o != "base"])
def test_the_log_is_a_service_of_the_overlay(overlay: str) -> None:
    objects = render(overlay)
    ports = {
        f"{o['metadata']['name']}:{port['port']}"
        for o in of_kind(objects, "Service")
        for port in o["spec"]["ports"]
    }
    for o in of_kind(objects, "Kafka"):
        ports |= {
            f"{o['metadata']['name']}-kafka-bootstrap:{listener['port']}"
            for listener in o["spec"]["kafka"]["listeners"]
        }
    assert set(parsed(overlay).kafka.bootstrap_servers) <= ports
    redis = [v["redisAddress"] for _, v in walk(objects) if isinstance(v, dict) and "redisAddress" in v]
    assert set(redis) <= ports
    assert len(redis) == (overlay == "overlays/ha")


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


# -- of one mind with the code ------------------------------------------------------------------------------


@overlays
def test_the_configuration_is_valid_and_on_the_volume(overlay: str) -> None:
    config, objects = parsed(overlay), render(overlay)
    for pod in ray_pods(objects):
        mounts = {m["name"]: m["mountPath"] for m in pod.spec["containers"][0]["volumeMounts"]}
        assert config.storage.is_relative_to(mounts["storage"]), pod.where


@overlays
def test_the_configuration_is_read_where_it_is_mounted(overlay: str) -> None:
    objects = render(overlay)
    text = yaml.safe_dump(objects, width=1 << 20)
    read = set(re.findall(r"(?:--config[\s,'-]+|config: )(/[\w./-]+)", text))
    assert read == {"/etc/grstream/grstream.yaml"}
    for pod in ray_pods(objects):
        mounts = {m["name"]: m["mountPath"] for m in pod.spec["containers"][0]["volumeMounts"]}
        assert mounts["config"] == "/etc/grstream", pod.where


def ray_pods(objects: list[Object]) -> list[Pod]:
    return [pod for pod in pods(objects) if "ray.io/node-type" in pod.labels]


@pytest.mark.parametrize("overlay", WITH_KAFKA)
def test_topics_and_users_are_those_of_the_configuration(overlay: str) -> None:
    objects, config = render(overlay), parsed(overlay)
    topics = {o["metadata"]["name"]: o["spec"] for o in of_kind(objects, "KafkaTopic")}
    assert set(topics) == {
        config.kafka.topic,
        config.kafka.dead_letters,
        config.kafka.items_topic,
        config.serve.exposure_topic,
    }
    actions, dead = topics[config.kafka.topic], topics[config.kafka.dead_letters]
    assert actions["config"]["cleanup.policy"] == "delete"
    assert actions["config"]["retention.ms"] > 0
    assert actions["partitions"] >= max(config.source.readers, config.serve.history_shards)
    assert dead["config"]["retention.ms"] == config.kafka.dead_letter_retention_ms
    assert topics[str(config.kafka.items_topic)]["config"]["cleanup.policy"] == "compact"
    for topic in topics.values():
        assert topic["replicas"] == 3
        assert topic["config"]["min.insync.replicas"] == 2
    allowed = {
        acl["resource"]["name"]: set(acl["operations"])
        for acl in one(objects, "KafkaUser", "grstream")["spec"]["authorization"]["acls"]
    }
    assert allowed == {
        config.kafka.topic: {"Read", "Write", "Describe"},
        config.kafka.dead_letters: {"Write", "Describe"},
        config.kafka.items_topic: {"Read", "Describe"},
        config.serve.exposure_topic: {"Write", "Describe"},
    }


@pytest.mark.parametrize("overlay", WITH_KAFKA)
def test_the_log_is_reached_as_its_listener_asks(overlay: str) -> None:
    objects = render(overlay)
    security = settings(objects)["kafka"]["security"]
    cluster = one(objects, "Kafka")
    [listener] = cluster["spec"]["kafka"]["listeners"]
    assert (listener["tls"], listener["authentication"]["type"]) == (True, "scram-sha-512")
    assert (security["protocol"], security["mechanism"]) == ("SASL_SSL", "SCRAM-SHA-512")
    assert one(objects, "KafkaUser", security["username"])["spec"]["authentication"] == {
        "type": "scram-sha-512"
    }
    for pod in ray_pods(objects):
        [volume] = [v for v in pod.spec["volumes"] if v["name"] == "kafka"]
        mounts = {m["name"]: m["mountPath"] for m in pod.spec["containers"][0]["volumeMounts"]}
        files = {
            f"{mounts['kafka']}/{item['path']}": (source["secret"]["name"], item["key"])
            for source in volume["projected"]["sources"]
            for item in source["secret"]["items"]
        }
        assert files[security["ca_file"]] == (f"{cluster['metadata']['name']}-cluster-ca-cert", "ca.crt")
        assert files[security["password_file"]] == (security["username"], "password")


def deployments(overlay: str) -> tuple[ServeDeploySchema, dict[str, Any], dict[str, Any]]:
    """The Serve document, what it says of deployments, and the deployments that the code makes."""
    document = yaml.safe_load(one(render(overlay), "RayService")["spec"]["serveConfigV2"])
    schema = ServeDeploySchema.model_validate(document)
    made = build_app(app.application(parsed(overlay), Keyring({})), name="grstream")
    return (
        schema,
        {d["name"]: d for d in document["applications"][0].get("deployments", [])},
        {d.name: d for d in made.deployments},
    )


@overlays
def test_the_serve_document_is_that_of_the_repository_and_names_deployments_that_there_are(
    overlay: str,
) -> None:
    schema, told, made = deployments(overlay)
    plain = yaml.safe_load((ROOT / "configs" / "serve.yaml").read_text())
    [application], [as_in_repository] = schema.applications, plain["applications"]
    for field in ("name", "route_prefix", "import_path"):
        assert getattr(application, field) == as_in_repository[field]
    config = parsed(overlay)
    assert schema.http_options.port == config.serve.port
    assert schema.http_options.host == config.serve.host
    assert set(told) <= set(made)
    if told:
        assert set(told) == set(made)  # so that each takes what pods were made for
        options = told["scorer"]["ray_actor_options"]
        assert options["runtime_env"]["env_vars"] == app.ALLOCATOR
        assert options.get("num_gpus", 0) == int(config.serve.gpu)
        for name in ("gateway", "scorer"):
            target = told[name]["autoscaling_config"]["target_ongoing_requests"]
            assert target < made[name].max_ongoing_requests


@overlays
def test_serving_workers_hold_the_least_and_the_most_replicas(overlay: str) -> None:
    _, told, made = deployments(overlay)
    cluster = one(render(overlay), "RayService")["spec"]["rayClusterConfig"]
    if not told:
        needed = sum(d.num_replicas * d.ray_actor_options["num_cpus"] for d in made.values())
        config = parsed(overlay)
        needed += config.train.workers * config.train.worker_cpus
        needed += config.source.readers * config.source.reader_cpus
        assert needed <= float(cluster["headGroupSpec"]["rayStartParams"]["num-cpus"])
        return
    for bound in ("min", "max"):
        offered = total(cluster["workerGroupSpecs"], f"{bound}Replicas")
        asked: dict[str, float] = {}
        for deployment in told.values():
            count = deployment.get("autoscaling_config", {}).get(f"{bound}_replicas", 1)
            options = deployment["ray_actor_options"]
            wants = {
                "CPU": options["num_cpus"],
                "GPU": options.get("num_gpus", 0),
                **options.get("resources", {}),
            }
            for resource, amount in wants.items():
                asked[resource] = asked.get(resource, 0) + count * amount
        assert all(amount <= offered.get(resource, 0) for resource, amount in asked.items()), (asked, offered)


def total(groups: list[Object], count: str) -> dict[str, float]:
    """What Ray will count in so many replicas of each group."""
    offered: dict[str, float] = {}
    for group in groups:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        counted = {"CPU": limits["cpu"], "GPU": limits.get("nvidia.com/gpu", 0), **group.get("resources", {})}
        for resource, amount in counted.items():
            offered[resource] = offered.get(resource, 0) + group[count] * float(amount)
    return offered


@pytest.mark.parametrize("overlay", ["base", *WITH_KAFKA])
def test_training_workers_hold_ranks_and_readers(overlay: str) -> None:
    config = parsed(overlay)
    groups = one(render(overlay), "RayJob")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert all(group["replicas"] == group["minReplicas"] == group["maxReplicas"] for group in groups)
    offered = total(groups, "replicas")
    ranks, readers = (
        config.train.workers * config.train.worker_cpus,
        config.source.readers * config.source.reader_cpus,
    )
    assert ranks + readers <= offered["CPU"]
    if config.train.gpu:
        [on_gpus] = [group for group in groups if group.get("resources", {}).get("GPU")]
        assert offered["GPU"] == config.train.workers
        assert float(on_gpus["resources"]["CPU"]) == config.train.worker_cpus  # none are left for readers
        assert readers <= offered["CPU"] - ranks


@overlays
def test_keys_are_asked_for_and_the_proxy_answers_for_the_dead(overlay: str) -> None:
    for pod in ray_pods(render(overlay)):
        if pod.labels["app.kubernetes.io/component"] == "serving":
            environment = {v["name"]: v for v in pod.spec["containers"][0]["env"]}
            assert environment[proxy.CALLBACK_VARIABLE]["value"] == proxy.CALLBACK, pod.where
            assert "secretKeyRef" in environment[configuration.API_KEYS_VARIABLE]["valueFrom"], pod.where


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
