"""The HTTP API as a document, made from the OpenAPI description of the gateway: docs/api-reference.md.

python -m serve.reference > docs/api-reference.md
"""

import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any, cast

from grstream.config import Config, EventsConfig
from serve.errors import WHY_NOT
from serve.gateway import Backend, create_app

Schema = Mapping[str, Any]

HEAD = """# The HTTP API, field by field

Made by `python -m serve.reference` from the OpenAPI description that a running server has at `/openapi.json`,
and as a page at `/docs`. What it does not say, [api.md](api.md) does.
"""

_REFUSALS = {str(status) for status in WHY_NOT}


def description() -> dict[str, Any]:
    """OpenAPI 3.1 of a gateway; it does not depend on the configuration."""
    config = Config(storage=pathlib.Path("unused"), events=EventsConfig(actions=["click"]))
    # Nothing is asked of what stands behind it.
    return create_app(config, cast(Backend, None)).openapi()


def markdown(openapi: Schema) -> str:
    """Every operation with its fields, then every schema that these name."""
    parts = [HEAD]
    for path, operations in openapi["paths"].items():
        for method, operation in operations.items():
            parts += ["", *_operation(method, path, operation)]
    parts += ["", "## Refusals", "", "An [ErrorAnswer](#erroranswer) with the status", ""]
    parts += [f"- {status}: {_flat(what)}" for status, what in WHY_NOT.items()]
    parts += ["", "## Schemas"]
    for name, schema in sorted(openapi["components"]["schemas"].items()):
        fields = _fields(schema) if "properties" in schema else [_type(schema)]
        parts += ["", f"### {name}", "", *_lines(schema.get("description", "")), *fields]
    return "\n".join(parts) + "\n"


def _operation(method: str, path: str, operation: Schema) -> Iterator[str]:
    yield f"## `{method.upper()} {path}`"
    yield ""
    yield from _lines(operation.get("description", ""))
    asked = operation.get("parameters", [])
    if asked:
        yield "| parameter | in | type | |"
        yield "|---|---|---|---|"
        for parameter in asked:
            said = parameter.get("description") or parameter["schema"].get("description", "")
            required = "required" if parameter.get("required") else ""
            yield _row(
                f"`{parameter['name']}`",
                parameter["in"],
                _type(parameter["schema"]),
                "; ".join(x for x in (required, said) if x),
            )
        yield ""
    body = operation.get("requestBody")
    if body:
        yield f"Body: {_type(body['content']['application/json']['schema'])}."
        yield ""
    refusals = [status for status in operation["responses"] if status in _REFUSALS]
    for status, answer in operation["responses"].items():
        if status not in refusals:
            content = answer.get("content", {}).get("application/json", {}).get("schema")
            yield f"{status}: {_type(content) if content else 'no body'}. Or [refused](#refusals)."


def _fields(schema: Schema) -> Iterator[str]:
    yield "| field | type | |"
    yield "|---|---|---|"
    required = schema.get("required", [])
    for name, field in schema["properties"].items():
        notes = ["required"] if name in required else []
        if "default" in field and field["default"] is not None:
            notes.append(f"default `{field['default']}`")
        notes += [f"{word} {field[key]}" for key, word in _BOUNDS if key in field]
        if field.get("description"):
            notes.append(field["description"])
        yield _row(f"`{name}`", _type(field), "; ".join(notes))


_BOUNDS = (
    ("minimum", "at least"),
    ("exclusiveMinimum", "above"),
    ("maximum", "at most"),
    ("minItems", "items at least"),
    ("maxItems", "items at most"),
    ("maxLength", "characters at most"),
)


def _type(schema: Schema) -> str:
    """A type as it is read; of a schema that has a name, a link to it."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return " or ".join(dict.fromkeys(_type(each) for each in schema[several]))
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    if schema.get("type") == "object":
        values = schema.get("additionalProperties")
        return f"object of {_type(values)}" if isinstance(values, Mapping) else "object"
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    return str(schema.get("type", "anything"))


def _lines(text: str) -> Iterator[str]:
    if text:
        yield text.strip()
        yield ""


def _row(*cells: str) -> str:
    return "| " + " | ".join(_flat(cell).replace("|", "\\|") for cell in cells) + " |"


def _flat(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    sys.stdout.write(markdown(description()))
