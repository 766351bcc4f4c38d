"""What outlives the ranks of a job is counted by its board."""

import asyncio

import pytest

from grstream import board
from grstream.board import BoardActor
from tests.exported import Exported

RESTARTS, REVERTS = ("grstream_train_restarts",), ("grstream_train_reverts",)


def test_a_start_after_the_first_is_a_restart_and_reverts_are_counted_over_checkpoints(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = Exported()
    monkeypatch.setattr(board, "Exporter", lambda: out)

    async def scenario() -> None:
        actor = BoardActor()
        assert out.values == {RESTARTS: 0, REVERTS: 0}
        await actor.started()
        assert out.values[RESTARTS] == 0
        await actor.started()
        await actor.started()
        assert [await actor.reverted(c) for c in (4, 4, 5)] == [1, 2, 1]

    asyncio.run(scenario())
    assert out.values == {RESTARTS: 2, REVERTS: 3}
