"""The API's document is what the gateway describes."""

import pathlib

from serve.reference import description, markdown

DOCUMENT = pathlib.Path(__file__).parent.parent.parent / "docs" / "api-reference.md"


def test_the_document_is_what_the_gateway_says_of_itself() -> None:
    assert DOCUMENT.read_text() == markdown(description()), (
        "run: python -m serve.reference > docs/api-reference.md"
    )


def test_every_operation_and_every_schema_that_it_names_is_told() -> None:
    told = markdown(description())
    for path in description()["paths"]:
        assert f"{path}`" in told
    links = {link.split(")")[0] for link in told.split("](#")[1:]}
    headings = {line[4:].lower() for line in told.splitlines() if line.startswith("### ")}
    assert links <= headings | {"refusals"}
