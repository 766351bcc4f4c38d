"""The reference and the schema say what the models say."""

import json
import pathlib
from collections.abc import Iterator

import pydantic
import pytest

from grstream import cli
from grstream.config import Config, RunConfig
from grstream.config.documents import markdown, schema
from grstream.config.environment import SECRETS
from grstream.config.faults import sections_in

ROOT = pathlib.Path(__file__).parents[2]


def fields(
    model: type[pydantic.BaseModel], path: str = ""
) -> Iterator[tuple[str, pydantic.fields.FieldInfo]]:
    for name, field in model.model_fields.items():
        yield f"{path}{name}", field
        for section in sections_in(field.annotation):
            yield from fields(section, f"{path}{name}.")


ALL = {**dict(fields(Config)), **dict(fields(RunConfig))}


@pytest.mark.parametrize("path", ALL)
def test_every_field_says_what_it_is(path: str) -> None:
    assert ALL[path].description


def test_the_reference_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "docs"]) == 0
    printed = capsys.readouterr().out
    written = (ROOT / "docs" / "configuration.md").read_text()
    assert written == printed, "run: grstream config docs > docs/configuration.md"


def test_the_reference_has_every_field_section_and_secret_once() -> None:
    text = markdown()
    for path in ALL:
        assert f"\n| `{path.rpartition('.')[2]}` | " in text
    headings = [line.lstrip("# ") for line in text.splitlines() if line.startswith("## ") or "### " in line]
    assert len(headings) == len(set(headings))
    assert {"kafka", "kafka.security", "kafka.security.oauth", "replay.actions", "epochs"} <= set(headings)
    for variable in SECRETS:
        assert text.count(f"| `{variable}` | ") == 1


@pytest.mark.parametrize(
    "row",
    [
        "| `storage` | path | **required** | ",
        "| `forget_within_s` | number, > 0, s | 86,400 (1 day) | ",
        "| `ahead_bytes` | integer, ≥ 1,048,576, bytes | 67,108,864 (64 MiB) | ",
        "| `port` | integer, ≥ 1, ≤ 65,535 | 8000 | ",
        "| `protocol` | `PLAINTEXT` \\| `SSL` \\| `SASL_PLAINTEXT` \\| `SASL_SSL` | ",
        "| `actions` | list of *name*, ≥ 1 and ≤ 31 of them | **required** | ",
        "| `hit_at` | list of integer (≥ 1), ≤ 8 of them | `[1, 10, 50]` | ",
        "| `action_weights` | map of *name* to number, ≥ 0 | `{}` | ",
        "| `oauth` | [section](#kafkasecurityoauth) | none | ",
        "| `betas` | list of 2: number | `[0.9, 0.98]` | ",
    ],
)
def test_a_row_tells_type_bounds_unit_and_default(row: str) -> None:
    assert f"\n{row}" in markdown()


def test_the_schema_is_one_of_the_whole_system(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "schema"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(schema())
    assert printed["$schema"].startswith("https://json-schema.org/")
    assert printed["required"] == ["storage", "events"]
    assert printed["additionalProperties"] is False
    assert printed["$defs"]["ServeConfig"]["properties"]["port"]["maximum"] == 65535
