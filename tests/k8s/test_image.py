"""The image, as far as it can be judged without building it."""

import fnmatch
import re
import shlex
import tomllib
from collections.abc import Iterator

import packaging.requirements
import packaging.specifiers
import packaging.utils
import packaging.version
import pytest

import grstream
from tests.conftest import ROOT
from tests.k8s.manifests import OVERLAYS, clusters, of_kind, pods, render

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions() -> Iterator[tuple[str, str]]:
    """Of the Dockerfile, with continued lines joined."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            name, _, rest = line.strip().partition(" ")
            yield name, rest


def copied() -> list[str]:
    sources = []
    for name, rest in instructions():
        if name == "COPY":
            sources += shlex.split(rest)[:-1]
    return sources


def ignored(path: str) -> bool:
    """By .dockerignore: the last pattern that matches decides; one without ** is of the top directory."""
    verdict = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        keeps = line.startswith("!")
        pattern = line.removeprefix("!")
        parts = path.split("/")
        if pattern.startswith("**/"):
            matches = any(fnmatch.fnmatch(part, pattern[3:]) for part in parts)
        else:
            matches = fnmatch.fnmatch(parts[0], pattern)
        if matches:
            verdict = not keeps
    return verdict


def pins() -> dict[str, packaging.version.Version]:
    found = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            found[packaging.utils.canonicalize_name(name)] = packaging.version.Version(version)
    return found


def test_what_is_copied_is_there_and_is_not_ignored() -> None:
    for source in copied():
        assert (ROOT / source).exists(), source
        assert not ignored(source), source
    packages = {p.parent.name for p in ROOT.glob("*/__init__.py")} - {"benchmarks"}
    assert packages <= set(copied())


@pytest.mark.parametrize(
    "path", [".git", ".venv", "var", "tests", "docs", "k8s", "jobs/__pycache__", "broker"]
)
def test_what_the_image_need_not_hold_is_ignored(path: str) -> None:
    assert ignored(path)


def test_the_code_comes_after_its_dependencies() -> None:
    steps = [(name, rest) for name, rest in instructions() if name in ("COPY", "RUN")]
    installed = max(i for i, (name, rest) in enumerate(steps) if "pip install" in rest)
    code = [i for i, (name, rest) in enumerate(steps) if name == "COPY" and "constraints.txt" not in rest]
    assert installed < min(code)


def test_it_runs_as_the_user_that_pods_say() -> None:
    users = [rest for name, rest in instructions() if name == "USER"]
    assert users == ["1000:1000"]
    assert "useradd --uid 1000" in (ROOT / "Dockerfile").read_text()


def test_everything_is_pinned() -> None:
    [base] = [rest for name, rest in instructions() if name == "FROM"]
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base)
    python = base.removeprefix("python:").partition("-")[0]
    assert python in packaging.specifiers.SpecifierSet(PROJECT["requires-python"])
    for name, rest in instructions():
        if name == "RUN":
            for install in re.findall(r"pip install([^&]*)", rest):
                assert "--constraint constraints.txt" in install


def test_every_pin_is_within_what_the_project_asks_for() -> None:
    held = pins()
    asked = PROJECT["dependencies"] + [
        r for extra in PROJECT["optional-dependencies"].values() for r in extra
    ]
    for text in asked:
        requirement = packaging.requirements.Requirement(text)
        name = packaging.utils.canonicalize_name(requirement.name)
        assert name in held, f"{name} is not in constraints.txt"
        assert held[name] in requirement.specifier, f"{text} and {held[name]} in constraints.txt"
    assert not [name for name, version in held.items() if version.local]


def test_no_secret_is_in_the_image() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert not re.search(r"(?i)(password|secret|token|api_key)\s*=", text)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_ask_for_the_version_that_the_project_is(overlay: str) -> None:
    variant = "-cuda" if overlay == "overlays/gpu" else ""
    images = {c["image"] for pod in pods(render(overlay)) for c in pod.containers}
    tags = {image.partition(":")[2] for image in images if image.startswith("grstream:")}
    assert tags == {grstream.__version__ + variant}


def test_the_ray_of_the_manifests_is_that_of_the_image() -> None:
    for overlay in OVERLAYS:
        for o in [*of_kind(render(overlay), "RayService"), *of_kind(render(overlay), "RayJob")]:
            for cluster in clusters(o):
                assert cluster["rayVersion"] == str(pins()["ray"])
