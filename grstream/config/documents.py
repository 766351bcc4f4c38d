"""All fields of the configuration as documents: Markdown for people, JSON Schema for editors."""

import json
from collections.abc import Iterator
from typing import Any

import pydantic

from grstream.config import environment
from grstream.config.run import RunConfig
from grstream.config.section import ACTION_NAME
from grstream.config.system import Config

HEAD = """\
# Configuration

One YAML file, the same for trainer, servers and tools. This page is what `grstream config docs` prints.
`grstream config check FILE` says what is wrong with a file, and `grstream config schema` prints a JSON
Schema by which editors complete and check.

A field that is not known is an error. A section that is left out has its defaults. *name* stands for a letter
and up to 63 letters, digits and `_.:-`.
"""
# By the end of a field's name; the first that fits.
UNITS = {
    "_per_s": "a second",
    "_ms": "ms",
    "_s": "s",
    "_h": "hours",
    "_days": "days",
    "_bytes": "bytes",
}
LARGER = {
    "ms": [("days", 86_400_000), ("hours", 3_600_000), ("minutes", 60_000), ("seconds", 1000)],
    "s": [("days", 86_400), ("hours", 3600), ("minutes", 60)],
    "bytes": [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)],
}
GROUPED = 10_000  # numbers from here on have their digits in groups
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}

Schema = dict[str, Any]


def schema() -> str:
    """Of the system's configuration, as JSON."""
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return json.dumps(dialect | Config.model_json_schema(), indent=2)


def markdown() -> str:
    """Every section, a table each, those within it behind it."""
    parts = [HEAD, *_tables(Config, "", 2), _secrets()]
    parts.append(
        "## A run over epochs\n\n"
        "Of `jobs/evaluate.py` where a data set's last items are held out: a file of its own, with `model` "
        "as [above](#model).\n"
    )
    parts += _tables(RunConfig, "", 3, skip=("model",))
    return "\n".join(parts)


def _tables(
    model: type[pydantic.BaseModel], path: str, level: int, skip: tuple[str, ...] = ()
) -> Iterator[str]:
    whole = model.model_json_schema()
    yield from _section(whole, whole.get("$defs", {}), path, level, skip)


def _section(
    section: Schema, defs: dict[str, Schema], path: str, level: int, skip: tuple[str, ...] = ()
) -> Iterator[str]:
    if path:
        yield f"{'#' * level} {path}\n\n{section['description']}\n"
    yield "| field | type | default | |\n|---|---|---|---|"
    fields = {name: field for name, field in section["properties"].items() if name not in skip}
    for name, field in fields.items():
        type_, default = _type(field, name, path), _default(field, name, section, path)
        yield f"| `{name}` | {type_} | {default} | {_cell(field['description'])} |"
    yield ""
    for name, field in fields.items():
        if below := _reference(field):
            at = _joined(path, name)
            yield from _section(defs[below], defs, at, 2 if path == "" and level == 2 else 3)


def _reference(field: Schema) -> str | None:
    """The section that a field is, may be, or lists."""
    for part in (field, *field.get("anyOf", []), field.get("items", {})):
        if "$ref" in part:
            return str(part["$ref"]).rpartition("/")[2]
    return None


def _type(field: Schema, name: str, path: str) -> str:
    if below := _reference(field):
        link = f"[section](#{_anchor(_joined(path, name))})" if below else ""
        return f"list of {link}" if "items" in field else link
    choices = [part for part in field.get("anyOf", [field]) if part.get("type") != "null"]
    kinds = [_kind(part) for part in choices]
    unit = _unit(name)
    return " or ".join(kinds) + (f", {unit}" if unit else "")


def _kind(part: Schema) -> str:
    if "enum" in part:
        return " \\| ".join(f"`{value}`" for value in part["enum"])
    if part["type"] == "array":
        if "prefixItems" in part:
            return f"list of {len(part['prefixItems'])}: {_kind(part['prefixItems'][0])}"
        kind, _, within = _kind(part["items"]).partition(", ")
        each = f"{kind} ({within})" if within else kind
        return f"list of {each}{_sizes(part, 'Items', 'of them')}"
    if part["type"] == "object":
        patterns = part.get("patternProperties")
        value = next(iter(patterns.values())) if patterns else part["additionalProperties"]
        return f"map of {'*name*' if patterns else 'text'} to {_kind(value)}"
    if part["type"] == "string":
        return _text(part)
    plain = {"integer": "integer", "number": "number", "boolean": "`true` \\| `false`"}[part["type"]]
    bounds = [f"{sign} {_number(part[bound])}" for bound, sign in BOUNDS.items() if bound in part]
    return ", ".join([plain, *bounds])


def _text(part: Schema) -> str:
    if part.get("format") == "path":
        return "path"
    if part.get("pattern") == f"^{ACTION_NAME.pattern}$":
        return "*name*"
    if part.get("pattern", "").startswith("^https://"):
        return "`https://` URL"
    return f"text{_sizes(part, 'Length', 'characters')}"


def _sizes(part: Schema, of: str, what: str) -> str:
    least, most = part.get(f"min{of}"), part.get(f"max{of}")
    if least == 1 and most is None:
        return ", not empty"
    bounds = [f"{sign} {bound:,}" for sign, bound in (("≥", least), ("≤", most)) if bound is not None]
    return f", {' and '.join(bounds)} {what}" if bounds else ""


def _default(field: Schema, name: str, section: Schema, path: str) -> str:
    if name in section.get("required", []):
        return "**required**"
    value = field["default"]
    if value is None:
        return "none"
    if _reference(field) and value:
        return "its fields'"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _number(value) + _larger(value, _unit(name))
    return f"`{json.dumps(value, ensure_ascii=False)}`"


def _number(value: float) -> str:
    if abs(value) < GROUPED:
        return f"{value:g}"
    return f"{value:,}" if isinstance(value, int) else f"{value:,g}"


def _larger(value: float, unit: str | None) -> str:
    """The same in a unit in which it is a small whole number."""
    for name, size in LARGER.get(unit or "", []):
        if value >= size and value % size == 0:
            return f" ({value / size:g} {name.removesuffix('s') if value == size else name})"
    return ""


def _unit(name: str) -> str | None:
    return next((unit for end, unit in UNITS.items() if name.endswith(end)), None)


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _anchor(path: str) -> str:
    return path.replace(".", "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _secrets() -> str:
    rows = [f"| `{variable}` | `{field}` |" for variable, field in environment.SECRETS.items()]
    return "\n".join(
        [
            "## Secrets and the environment\n",
            "Secrets are never written in the configuration, which names files that hold them. These "
            "environment variables take the place of such a file, in each process that needs it: on a Ray "
            "cluster, in the environment in which `ray start` runs on every node.\n",
            "| variable | instead of |\n|---|---|",
            *rows,
            "",
        ]
    )
