"""The files of a weights version: arrays as safetensors, the strings of string ids as JSON."""

import json
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from grstream.weights import Delta, Weights

DENSE = "dense.safetensors"
ROWS, NAMES = "rows.safetensors", "item_names.json"
TOUCHED, NEW_NAMES = "touched.safetensors", "new_item_names.json"
OF_WEIGHTS, OF_DELTA = (DENSE, ROWS, NAMES), (DENSE, TOUCHED, NEW_NAMES)
OF_ROWS = (TOUCHED, NEW_NAMES)  # of a delta that another one follows


class Unreadable(ValueError):
    """A file is intact, but does not hold what it should."""


def encoded(weights: Weights | None, delta: Delta | None) -> dict[str, bytes]:
    """The files of a version that is to be had either way. Both have the same dense parameters."""
    files: dict[str, bytes] = {}
    if delta is not None:
        arrays = {name: getattr(delta, name) for name in ("places", "keys", "rows", "items")}
        arrays["size"] = np.array(delta.size, np.int64)
        files |= {DENSE: _tensors(delta.dense), TOUCHED: _tensors(arrays), NEW_NAMES: _json(delta.item_names)}
    if weights is not None:
        arrays = {name: getattr(weights, name) for name in ("keys", "rows", "items")}
        files |= {DENSE: _tensors(weights.dense), ROWS: _tensors(arrays), NAMES: _json(weights.item_names)}
    return files


def weights_of(files: Mapping[str, bytes]) -> Weights:
    """From the files OF_WEIGHTS. Raises Unreadable."""
    try:
        arrays = safetensors.numpy.load(files[ROWS])
        return Weights(safetensors.numpy.load(files[DENSE]), item_names=_names(files[NAMES]), **arrays)
    except (safetensors.SafetensorError, ValueError, TypeError) as error:
        raise Unreadable(str(error)) from error


def delta_of(previous: int, files: Mapping[str, bytes]) -> Delta:
    """From the files OF_DELTA, or, without dense parameters, OF_ROWS. Raises Unreadable."""
    try:
        arrays = safetensors.numpy.load(files[TOUCHED])
        size = int(arrays.pop("size"))
        dense = safetensors.numpy.load(files[DENSE]) if DENSE in files else {}
        return Delta(previous, size, dense, item_names=_names(files[NEW_NAMES]), **arrays)
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
        raise Unreadable(str(error)) from error


def _tensors(arrays: Mapping[str, npt.NDArray]) -> bytes:
    data: bytes = safetensors.numpy.save({name: np.asarray(a, order="C") for name, a in arrays.items()})
    return data


def _json(names: Mapping[int, str]) -> bytes:
    return json.dumps({str(key): name for key, name in names.items()}).encode()


def _names(data: bytes) -> dict[int, str]:
    return {int(key): str(name) for key, name in json.loads(data).items()}
