"""What is wrong with a configuration: the field, its line, what it may be, and which one may be meant."""

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Sequence

import pydantic
import yaml

LISTED = 12  # fields that a message names

Location = Sequence[int | str]


@dataclasses.dataclass(frozen=True)
class Fault:
    path: str  # dotted; empty of the whole
    line: int | None  # from 1 on; None where the source has no lines
    message: str

    def __str__(self) -> str:
        where = self.path or "(top)"
        return f"{where}{'' if self.line is None else f' (line {self.line})'}: {self.message}"


def faults(
    error: pydantic.ValidationError, model: type[pydantic.BaseModel], source: yaml.Node | None
) -> list[Fault]:
    """All of them, in the order of their lines. No message quotes what was written but names of fields."""
    found = []
    for each in error.errors(include_input=False, include_url=False):
        location = each["loc"]
        message = each["msg"].removeprefix("Value error, ")
        if each["type"] == "extra_forbidden":
            message = _unknown(model, location)
        elif each["type"] == "missing":
            message = "is required"
        path = ".".join(str(part) for part in location)
        found.append(Fault(path, line_of(source, location), message))
    return sorted(found, key=lambda fault: fault.line or 0)


def line_of(source: yaml.Node | None, location: Location) -> int | None:
    """The line of a field, or of the nearest section around it that was written."""
    if source is None:
        return None
    line = source.start_mark.line
    for part in location:
        if isinstance(source, yaml.MappingNode):
            at = next((pair for pair in source.value if pair[0].value == str(part)), None)
            if at is None:
                break
            line, source = at[0].start_mark.line, at[1]
        elif isinstance(source, yaml.SequenceNode) and isinstance(part, int) and part < len(source.value):
            source = source.value[part]
            line = source.start_mark.line
        else:
            break
    return int(line) + 1


def written_twice(source: yaml.Node | None, path: tuple[str, ...] = ()) -> Iterator[Fault]:
    """Keys that a mapping has twice, of which YAML keeps the last."""
    if isinstance(source, yaml.SequenceNode):
        for i, value in enumerate(source.value):
            yield from written_twice(value, (*path, str(i)))
    if isinstance(source, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in source.value:
            name = str(key.value)
            here = (*path, name)
            if name in seen:
                line = key.start_mark.line + 1
                yield Fault(".".join(here), line, "is written twice, and this one counts")
            seen.add(name)
            yield from written_twice(value, here)


def sections_in(annotation: object) -> list[type[pydantic.BaseModel]]:
    """The sections that a field's type names."""
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return [annotation]
    return [section for part in typing.get_args(annotation) for section in sections_in(part)]


def _unknown(model: type[pydantic.BaseModel], location: Location) -> str:
    *around, last = location
    name, known = str(last), _fields_at(model, around)
    near = difflib.get_close_matches(name, known, 1)
    if near:
        return f"there is no such field; did you mean {near[0]}?"
    elsewhere = [path for path in _paths(model) if path.rpartition(".")[2] == name]
    if elsewhere:
        return f"there is no such field here; did you mean {' or '.join(elsewhere)}?"
    if len(known) <= LISTED:
        return f"there is no such field; known are {', '.join(known)}"
    return "there is no such field; `grstream config docs` lists all"


def _fields_at(model: type[pydantic.BaseModel], location: Location) -> list[str]:
    for part in location:
        field = model.model_fields.get(str(part))
        if field is not None:  # else the index of a list
            model = sections_in(field.annotation)[0]
    return list(model.model_fields)


def _paths(model: type[pydantic.BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield name
        for section in sections_in(field.annotation):
            yield from (f"{name}.{path}" for path in _paths(section))
