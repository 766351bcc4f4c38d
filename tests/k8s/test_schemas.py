"""Every object of every overlay is one that Kubernetes and the operators take, and what is wrong is found."""

import copy
from collections.abc import Callable

import pytest

from tests.k8s.manifests import OVERLAYS, Object, one, render
from tests.k8s.schemas import Invalid, Schemas

BUILT_IN = {"v1", "apps/v1", "policy/v1", "networking.k8s.io/v1"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubernetes_own_objects_are_valid(overlay: str, schemas: Schemas) -> None:
    for o in render(overlay):
        if o["apiVersion"] in BUILT_IN:
            schemas.validate(o)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_objects_of_operators_are_valid(overlay: str, schemas: Schemas) -> None:
    for o in render(overlay):
        if o["apiVersion"] not in BUILT_IN:
            schemas.validate(o)


def head(o: Object) -> Object:
    cluster: Object = o["spec"].get("rayClusterConfig") or o["spec"]["rayClusterSpec"]
    found: Object = cluster["headGroupSpec"]["template"]["spec"]
    return found


WRONG: dict[str, tuple[str, Callable[[Object], object]]] = {
    "an unknown field of a policy": ("NetworkPolicy", lambda o: o["spec"].update(policyType=["Egress"])),
    "a port that is no number": ("Service", lambda o: o["spec"]["ports"][0].update(port="http")),
    "replicas as text": ("StatefulSet", lambda o: o["spec"].update(replicas="1")),
    "an unknown field of a service": ("RayService", lambda o: o["spec"].update(upgradePolicy={})),
    "an unknown field of a cluster": (
        "RayService",
        lambda o: o["spec"]["rayClusterConfig"].update(autoscaling=True),
    ),
    "an unknown field of a container": (
        "RayService",
        lambda o: head(o)["containers"][0].update(environment=[]),
    ),
    "a number as text": ("RayJob", lambda o: o["spec"].update(backoffLimit="7")),
    "parameters that are no text": (
        "RayJob",
        lambda o: o["spec"]["rayClusterSpec"]["headGroupSpec"].update(rayStartParams={"num-cpus": 0}),
    ),
    "a mode that there is not": (
        "RayService",
        lambda o: o["spec"]["rayClusterConfig"]["authOptions"].update(mode="password"),
    ),
    "a worker group without a name": (
        "RayJob",
        lambda o: o["spec"]["rayClusterSpec"]["workerGroupSpecs"][0].pop("groupName"),
    ),
    "an unknown field of a topic": ("KafkaTopic", lambda o: o["spec"].update(partition=1)),
    "an operation that there is not": (
        "KafkaUser",
        lambda o: o["spec"]["authorization"]["acls"][0].update(operations=["Consume"]),
    ),
    "a role that there is not": ("KafkaNodePool", lambda o: o["spec"].update(roles=["zookeeper"])),
    "an unknown field of a listener": (
        "Kafka",
        lambda o: o["spec"]["kafka"]["listeners"][0].update(ssl=True),
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_refused(what: str, schemas: Schemas) -> None:
    kind, spoil = WRONG[what]
    right = next(o for o in render("overlays/ha") if o["kind"] == kind)
    wrong = copy.deepcopy(right)
    spoil(wrong)
    schemas.validate(right)
    with pytest.raises(Invalid, match=rf"^{kind}/"):
        schemas.validate(wrong)


def test_an_object_that_no_schema_knows_is_refused(schemas: Schemas) -> None:
    o = one(render("base"), "RayJob")
    schemas.validate(o)
    with pytest.raises(Invalid, match="no schema"):
        schemas.validate({**o, "apiVersion": "ray.io/v2"})
