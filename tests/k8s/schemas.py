"""Whether Kubernetes would take an object, by its own schemas and those of CRDs, unknown fields refused."""

import copy
import functools
import pathlib
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.k8s.manifests import Object

KUBERNETES = "1.32"


class Invalid(ValueError):
    """An object is not what its schema says; the message names the field."""


class Schemas:
    """Kubernetes' own schemas, and the CRDs in a directory."""

    def __init__(self, crds: pathlib.Path | None) -> None:
        self._crds = crds

    def validate(self, o: Object) -> None:
        """Raises Invalid; skips for a kind whose CRD is not at hand."""
        try:
            kubernetes_validate.validate(o, KUBERNETES, strict=True)
        except kubernetes_validate.SchemaNotFoundError:
            if self._crds is None or not self._crds.is_dir():
                pytest.skip(f"no CRDs, of which {o['kind']} is one: set GRSTREAM_TEST_ASSETS")
            self._validate_custom(o, self._crds)
        except kubernetes_validate.ValidationError as error:
            raise Invalid(_told(o, error)) from error

    def _validate_custom(self, o: Object, crds: pathlib.Path) -> None:
        validators = _validators(crds)
        of_it = (o["kind"], o["apiVersion"])
        if of_it not in validators:
            raise Invalid(f"no schema is known of {of_it}")
        error = jsonschema.exceptions.best_match(validators[of_it].iter_errors(o))
        if error is not None:
            raise Invalid(_told(o, error))


def _told(o: Object, error: jsonschema.ValidationError) -> str:
    path = ".".join(map(str, error.absolute_path))
    return f"{o['kind']}/{o['metadata']['name']}: {path}: {error.message}"


@functools.cache
def _validators(crds: pathlib.Path) -> dict[tuple[str, str], jsonschema.Draft202012Validator]:
    found = {}
    for path in sorted(crds.glob("*.yaml")):
        spec = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]
        for version in spec["versions"]:
            schema = closed(version["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = {
                "type": "object"
            }  # Kubernetes' own, which a CRD does not spell out
            name = (spec["names"]["kind"], f"{spec['group']}/{version['name']}")
            found[name] = jsonschema.Draft202012Validator(schema)
    return found


def closed(schema: Any) -> Any:
    """The schema with unknown fields refused, as the API server does of a strict client."""
    schema = copy.copy(schema)
    for field in ("properties",):
        if field in schema:
            schema[field] = {name: closed(inner) for name, inner in schema[field].items()}
    for field in ("items", "additionalProperties"):
        if isinstance(schema.get(field), dict):
            schema[field] = closed(schema[field])
    if schema.get("x-kubernetes-int-or-string"):
        schema["type"] = ["integer", "string"]
    if schema.get("nullable"):
        schema["type"] = [schema["type"], "null"]
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if schema.get("type") == "object" and not open_ended:
        schema["additionalProperties"] = False
    return schema
