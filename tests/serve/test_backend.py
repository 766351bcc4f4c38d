"""What replicas raise, as the gateway answers it."""

import pytest
from ray.exceptions import RayTaskError

from serve.backend import _reaching
from serve.errors import OtherSchema, QueueFull, Unavailable


@pytest.mark.parametrize(
    ("cause", "kind"), [(OtherSchema("it was started"), "schema_changing"), (QueueFull("it"), "queue_full")]
)
def test_what_passes_by_itself_is_a_503_that_says_who_refused(cause: Exception, kind: str) -> None:
    with pytest.raises(Unavailable) as caught, _reaching("history shard"):
        raise RayTaskError("history", "a traceback", cause)
    assert caught.value.status == 503
    assert caught.value.problem.type == kind
    assert caught.value.problem.message == f"history shard: {cause}"


def test_any_other_error_of_a_replica_is_raised_as_itself() -> None:
    with pytest.raises(KeyError), _reaching("scorer"):
        raise RayTaskError("rank", "a traceback", KeyError("a bug"))
