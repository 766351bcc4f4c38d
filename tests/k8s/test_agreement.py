"""The manifests and the code that they run are of one mind: names, addresses, paths, CPUs."""

import re
from typing import Any

import pytest
import yaml
from ray.serve._private.build_app import build_app
from ray.serve.schema import ServeDeploySchema

from grstream import config as configuration
from grstream.config import Config, KafkaConfig
from serve import app, proxy
from serve.middleware import Keyring
from tests.conftest import ROOT
from tests.k8s.manifests import OVERLAYS, Object, of_kind, one, ray_pods, render, settings, walk

WITH_KAFKA = ["overlays/gpu", "overlays/ha"]
overlays = pytest.mark.parametrize("overlay", OVERLAYS)


def parsed(overlay: str) -> Config:
    """The overlay's grstream YAML, as its pods will read it."""
    given = settings(render(overlay))
    if "security" not in KafkaConfig.model_fields:
        given["kafka"].pop("security", None)
    return configuration.parse(given, overlay)


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
        assert float(on_gpus["resources"]["CPU"]) == config.train.worker_cpus  # none are left for others
        assert set(config.source.reader_resources) - set(on_gpus["resources"])
        for resource, amount in config.source.reader_resources.items():
            assert config.source.readers * amount <= offered[resource]
        assert readers <= offered["CPU"] - ranks


@overlays
def test_keys_are_asked_for_and_the_proxy_answers_for_the_dead(overlay: str) -> None:
    for pod in ray_pods(render(overlay)):
        if pod.labels["app.kubernetes.io/component"] == "serving":
            environment = {v["name"]: v for v in pod.spec["containers"][0]["env"]}
            assert environment[proxy.CALLBACK_VARIABLE]["value"] == proxy.CALLBACK, pod.where
            assert "secretKeyRef" in environment[configuration.API_KEYS_VARIABLE]["valueFrom"], pod.where
