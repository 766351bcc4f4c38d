"""What kustomize makes of k8s/: the objects, and the pods that are spelled out in them."""

import dataclasses
import functools
import pathlib
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

K8S = pathlib.Path(__file__).parents[2] / "k8s"
OVERLAYS = ["base", "overlays/dev", "overlays/gpu", "overlays/ha"]

Object = dict[str, Any]


@functools.cache
def _rendered(directory: str) -> str:
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl, whose kustomize renders the manifests")
    made = subprocess.run(["kubectl", "kustomize", str(K8S / directory)], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return made.stdout


def render(directory: str) -> list[Object]:
    """The objects of a base or an overlay, made anew for the caller; skips where there is no kubectl."""
    return list(yaml.safe_load_all(_rendered(directory)))


def of_kind(objects: list[Object], kind: str, name: str | None = None) -> list[Object]:
    return [o for o in objects if o["kind"] == kind and name in (None, o["metadata"]["name"])]


def one(objects: list[Object], kind: str, name: str | None = None) -> Object:
    [found] = of_kind(objects, kind, name)
    return found


@dataclasses.dataclass(frozen=True)
class Pod:
    """A pod template, and where it is."""

    where: str
    labels: dict[str, str]
    spec: Object

    @property
    def containers(self) -> list[Object]:
        return [*self.spec["containers"], *self.spec.get("initContainers", [])]


def clusters(o: Object) -> Iterator[Object]:
    """The Ray clusters that an object spells out."""
    for field in ("rayClusterConfig", "rayClusterSpec"):
        if field in o["spec"]:
            yield o["spec"][field]


def pods(objects: list[Object]) -> Iterator[Pod]:
    """Every pod that is spelled out, workers of Ray's groups, too."""
    for o in objects:
        name = f"{o['kind']}/{o['metadata']['name']}"
        if o["kind"] in ("Deployment", "StatefulSet", "Job"):
            yield _pod(name, o["spec"]["template"])
        if o["kind"] == "RayJob":
            yield _pod(f"{name} submitter", o["spec"]["submitterPodTemplate"])
        if o["kind"] in ("RayService", "RayJob"):
            for cluster in clusters(o):
                yield _pod(f"{name} head", cluster["headGroupSpec"]["template"], "head")
                for group in cluster.get("workerGroupSpecs", []):
                    yield _pod(f"{name} {group['groupName']}", group["template"], "worker")


def _pod(where: str, template: Object, node_type: str | None = None) -> Pod:
    labels = dict(template["metadata"]["labels"])
    if node_type is not None:
        labels["ray.io/node-type"] = node_type  # as KubeRay labels it
    return Pod(where, labels, template["spec"])


def settings(objects: list[Object]) -> Object:
    """The grstream YAML of the ConfigMap, loaded."""
    [held] = [o for o in of_kind(objects, "ConfigMap") if "grstream.yaml" in o["data"]]
    loaded: Object = yaml.safe_load(held["data"]["grstream.yaml"])
    return loaded
