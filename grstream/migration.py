"""A learner's saved state, made to fit a configuration whose schema has grown since.

Parameters whose first axis is that of the actions get rows for the new ones, as in a new model, and their
optimizer no moments; all else stays as it was, bit for bit. No parameter depends on the number of features: a
new one's keys are new to the vocabulary. How figures begin for a new action is up to `StreamMetrics`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from grstream.schema import Schema, SchemaChanged
from grstream.weights import Recipe

Arrays = dict[str, npt.NDArray]
Shape = tuple[int, ...]

# What of a model may change between one run and the next without its parameters meaning something else.
_FREE = {"dropout", "dtype"}
_REMEDY = "go back to what it was, or begin anew with another `storage`"


def fit(
    state: dict[str, Any],
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    shapes: Mapping[str, Shape],
    fresh: Callable[[], Arrays],
) -> list[str]:
    """Make a state fit `recipe`, in place; what was migrated, a line each, nothing where nothing had to be.

    `shapes` are those of the model's parameters, `fresh` gives them as in a new model. Raises SchemaChanged
    where the state cannot go on, with nothing changed.
    """
    held, said = _recipe_of(state, recipe)
    _require_same_model(held, recipe)
    problem = Schema.of(recipe).not_grown_from(Schema.of(held))
    if problem is not None:
        raise SchemaChanged(
            f"the checkpoint has learned from other events than are configured: {problem}. Names may only be "
            "added, actions behind the others; a renamed one is another, and one that no event carries any "
            f"more may stay: {_REMEDY}"
        )
    _require_shapes(state["model"], shapes, len(held.actions), len(recipe.actions))
    actions = recipe.actions[len(held.actions) :]
    if actions:
        beginnings = fresh()
        for name, array in state["model"].items():
            state["model"][name] = _longer(array, beginnings[name])
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for at, moments in state["optimizer"]["state"].items():
            zeros = np.zeros(tuple(parameters[at].shape), np.float32)
            # The number of steps has no axis: new rows count as trained as long, with gradients of zero.
            moments.update({name: _longer(array, zeros) for name, array in moments.items() if array.ndim})
    features = [name for name in recipe.features if name not in held.features]
    return [
        *said,
        *(f"action {name} is new: its parameters and its figures begin now" for name in actions),
        *(f"feature {name} is new: absent from every event so far" for name in features),
    ]


def _recipe_of(state: dict[str, Any], recipe: Recipe) -> tuple[Recipe, list[str]]:
    """What a state was saved under; one from before states said so is taken to be of today's if it can be."""
    if "recipe" in state:
        return Recipe.model_validate(state["recipe"]), []
    actions = len(state["model"]["actions"])
    if actions != len(recipe.actions) or recipe.features or not state["vocabulary"]["items"].all():
        raise SchemaChanged(
            f"the checkpoint is of before checkpoints named actions and features. With its {actions} actions "
            "it can go on where as many and no features are configured, if it has learned of none: "
            f"{_REMEDY}"
        )
    return recipe, [f"it names no actions: its {actions} are taken to be {', '.join(recipe.actions)}"]


def _require_same_model(held: Recipe, recipe: Recipe) -> None:
    before, now = held.model.model_dump(exclude=_FREE), recipe.model.model_dump(exclude=_FREE)
    changed = [
        f"model.{name} was {before[name]} and is {now[name]}" for name in now if before[name] != now[name]
    ]
    if changed:
        raise _another_model(", ".join(changed))


def _require_shapes(model: Arrays, shapes: Mapping[str, Shape], before: int, now: int) -> None:
    for name in sorted(model.keys() | shapes.keys()):
        if name not in model or name not in shapes:
            raise _another_model(f"{name} is a parameter of one of the two alone")
        was, shape = model[name].shape, shapes[name]
        if was != shape and (was[:1], shape) != ((before,), (now, *was[1:])):
            raise _another_model(f"{name} was of shape {was} and is of {shape}")


def _another_model(difference: str) -> SchemaChanged:
    return SchemaChanged(f"the checkpoint is of another model than is configured: {difference}; {_REMEDY}")


def _longer(array: npt.NDArray, beginning: npt.NDArray) -> npt.NDArray:
    """The array, and behind its rows those that `beginning` has beyond."""
    return array if array.shape == beginning.shape else np.concatenate([array, beginning[len(array) :]])
