"""Reads what callers hand in: numbers, token ids and masks, of Python, numpy, jax, torch or a tokenizer.

What is clear is taken. Everything else is refused in one sentence, before anything is compiled: inside
``jit`` nothing can complain, and what JAX says of a wrong type takes a reader of JAX to understand.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Integer

_CACHE_DTYPES = ("float32", "bfloat16", "float16")


def plain(value: Any) -> Any:
    """Returns an array of torch, jax or numpy as numpy's, bfloat16 as float32; anything else as it is.

    Raises:
        ValueError: it has no plain numbers: a masked array, a random key, a sparse or abstract tensor.
    """
    if isinstance(value, np.ma.MaskedArray):
        raise ValueError("Masked arrays are not read: give attention_mask= instead of a masked array.")
    if isinstance(value, jax.Array):
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            raise ValueError("A random key of JAX is no number: give seed= an integer.")
        value = jax.device_get(value)
    elif hasattr(value, "detach"):
        value = _of_torch(value)
    elif hasattr(value, "__array__"):
        value = np.asarray(value)
    if isinstance(value, np.ndarray | np.generic) and value.dtype == jnp.bfloat16:
        return value.astype(np.float32)  # numpy does not count bfloat16 among its floats
    return value


def _of_torch(tensor: Any) -> np.ndarray:
    """Returns a tensor of torch, without importing it, as numpy's."""
    try:
        tensor = tensor.detach().cpu()
        return np.asarray(tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            "A tensor of torch has no plain numbers that numpy could hold (is it sparse, quantized or on the "
            "meta device?): give a dense one."
        ) from error


def as_int(value: Any) -> int | None:
    """Returns a whole number of any kind (2, 2.0, np.int64(2), an array of one) as an int; else None."""
    if isinstance(value, bool | str | bytes):
        return None
    value = plain(value)
    if isinstance(value, np.ndarray):
        if value.ndim or not (
            np.issubdtype(value.dtype, np.integer) or np.issubdtype(value.dtype, np.floating)
        ):
            return None
        value = value.item()
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    try:
        return operator.index(value)
    except TypeError:
        return None


def as_float(value: Any) -> float | None:
    """Returns a number of any kind as a float; None for everything else, also for NaN."""
    if isinstance(value, bool | str | bytes):
        return None
    value = plain(value)
    if isinstance(value, np.ndarray):
        if value.ndim or value.dtype == bool or not np.can_cast(value.dtype, np.float64):
            return None
        value = value.item()
    if not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return None if math.isnan(number) else number


def whole_number(name: str, value: Any, least: int, most: int | None = None) -> int:
    """Returns an argument as an int.

    Raises:
        ValueError: it is no whole number, or outside ``least`` to ``most``.
    """
    number = as_int(value)
    if number is None:
        raise ValueError(f"{name} must be a whole number, not {_short(value)}.")
    if most is not None and not least <= number <= most:
        limit = "2**32 - 1" if most == 2**32 - 1 else most
        raise ValueError(f"{name} must be between {least} and {limit}, not {number}.")
    if number < least:
        raise ValueError(f"{name} must be at least {least}, not {number}.")
    return number


def yes_or_no(name: str, value: Any) -> bool:
    """Returns a flag as a bool.

    Raises:
        ValueError: it is neither True nor False.
    """
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be True or False, not {_short(value)}.")
    return bool(value)


def as_dtype(value: Any) -> np.dtype | None:
    """Returns a dtype of numpy, jax or torch, or of its name, as numpy's; None where it is none."""
    if str(value).startswith("torch."):
        value = str(value).removeprefix("torch.")
    try:
        return np.dtype(value)
    except (TypeError, ValueError, SyntaxError):  # numpy parses strings
        return None


def cache_dtype_of(value: Any) -> np.dtype | None:
    """Returns the dtype of a KV cache; None stays None.

    Raises:
        ValueError: it is none that a cache can have.
    """
    if value is None:
        return None
    dtype = as_dtype(value)
    if dtype is None or dtype.name not in _CACHE_DTYPES:
        raise ValueError(f"cache_dtype must be one of {', '.join(_CACHE_DTYPES)}, not {_short(value)}.")
    return dtype


def one_by_one(given: Any, refusal: str) -> Iterable[Any]:
    """Returns what is to be integers; a single integer is one of them.

    Raises:
        ValueError: it is text, a mapping or nothing to go through; ``refusal`` is the sentence.
    """
    given = plain(given)
    if as_int(given) is not None:
        return [given]
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        raise ValueError(refusal)
    return given


def layer_numbers(given: Any, depth: int, name: str = "extract_layers") -> tuple[int, ...]:
    """Returns the layers that are asked for, in the given order; a set's from the lowest on.

    Args:
        given: an integer, or several of any kind.
        depth: how many layers the model has.
        name: of the argument, for errors.

    Raises:
        ValueError: none, one twice, one that the model does not have, or no integers.
    """
    numbers = []
    refusal = f"{name} must be layer numbers such as (10, 11), not {_short(given)}."
    for layer in one_by_one(given, refusal):
        number = as_int(layer)
        if number is None:
            raise ValueError(f"{name} must be layer numbers, and {_short(layer)} is none.")
        numbers.append(number)
    if isinstance(given, Set):
        numbers.sort()
    outside = [layer for layer in numbers if not 0 <= layer < depth]
    if outside:
        raise ValueError(
            f"{name} {outside} are out of range: the model has {depth} layers, 0 to {depth - 1}."
        )
    if not numbers or len(set(numbers)) != len(numbers):
        raise ValueError(f"{name} must name at least one layer and none twice, not {numbers}.")
    return tuple(numbers)


def integer_row(name: str, given: Any, count: int, each: str) -> Integer[np.ndarray, " count"]:
    """Returns an argument of one integer for each of ``count`` things, which ``each`` names.

    Raises:
        ValueError: other than that.
    """
    given = plain(given)
    array = _array([plain(one) for one in given] if isinstance(given, list | tuple) else given)
    array = array[None] if count == 1 and not array.ndim else array
    if array.shape != (count,) or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"{name} must be {count} integers, one a {each}, not {_short(given)} ({array.dtype} of shape "
            f"{array.shape})."
        )
    return array


def token_rows(
    name: str, given: Any
) -> tuple[list[Integer[np.ndarray, " tokens"]], list[Bool[np.ndarray, " tokens"]] | None]:
    """Returns prompts as one array of integers each, and the attention masks that came with them, if any.

    Args:
        name: of the argument, for errors.
        given: [P, P_len] or a list of P prompts, each of any kind of array or list, or what a tokenizer
            returns for it; or a single prompt's ids.

    Raises:
        ValueError: text, anything but integers, lists nested too deep, or a mask that does not fit.
    """
    mask = _mask_of(given)
    given = _ids_of(plain(given))
    _refuse_text(name, given)
    if (
        isinstance(given, Set)
        or not isinstance(given, Iterable)
        or (isinstance(given, np.ndarray) and given.ndim == 0)
    ):
        raise ValueError(f"{name} must be integers [prompts, tokens], not {_short(given)}.")
    given = given if isinstance(given, np.ndarray) else list(given)
    if np.ndim(given) == 1 if isinstance(given, np.ndarray) else given and _is_scalar(given[0]):
        given = [given]  # one prompt
    rows = [_integers(name, plain(row)) for row in given]
    if mask is not None:
        return rows, mask_rows(mask, rows)
    own = [_mask_of(row) for row in given]
    if all(one is None for one in own):
        return rows, None
    pairs = zip(rows, own, strict=True)
    return rows, [np.ones(len(row), bool) if one is None else mask_rows(one, [row])[0] for row, one in pairs]


def mask_rows(mask: Any, rows: Sequence[np.ndarray]) -> list[Bool[np.ndarray, " tokens"]]:
    """Returns an attention mask as one array for each prompt, True where a token is to be read.

    Raises:
        ValueError: another shape than the prompts', or other values than 0 and 1.
    """
    mask = plain(mask)
    values = [_array(plain(row)) for row in mask] if isinstance(mask, Iterable) else []
    if len(rows) == 1 and values and values[0].ndim == 0:
        values = [np.asarray(values)]
    shapes = [row.shape for row in values]
    if shapes != [row.shape for row in rows]:
        raise ValueError(
            f"attention_mask must have the shape of input_ids, {_shape([row.shape for row in rows])}, not "
            f"{_shape(shapes)}."
        )
    for row in values:
        if row.dtype != bool and not (np.issubdtype(row.dtype, np.number) and np.isin(row, (0, 1)).all()):
            raise ValueError("attention_mask must be 1 at tokens and 0 at padding, and holds other values.")
    return [row.astype(bool) for row in values]


def _array(values: Any) -> np.ndarray:
    """Returns what numpy makes of values; of lists of several lengths, or huge numbers, an array of None."""
    try:
        return np.asarray(values)
    except (ValueError, OverflowError):
        return np.asarray(None)


def _mask_of(value: Any) -> Any:
    return value.get("attention_mask") if isinstance(value, Mapping) else None


def _ids_of(value: Any) -> Any:
    """Returns the ids of what a tokenizer returned (``BatchEncoding``); anything else as it is."""
    if not isinstance(value, Mapping):
        return value
    if "input_ids" not in value:
        raise ValueError(f"A mapping of prompts must have input_ids, and has {', '.join(map(str, value))}.")
    return plain(value["input_ids"])


def _refuse_text(name: str, value: Any) -> None:
    if isinstance(value, str | bytes):
        raise ValueError(
            f"{name} takes token ids, not text such as {_short(value)}: tokenizer(text).input_ids gives them."
        )


def _integers(name: str, row: Any) -> np.ndarray:
    """Returns one prompt's ids; of a tokenizer's [1, tokens] for one text its only row."""
    ids = _ids_of(row)
    _refuse_text(name, ids)
    if isinstance(ids, Set) or not isinstance(ids, Iterable):
        raise ValueError(f"{name} must be integers [prompts, tokens], not {_short(ids)} among lists.")
    array = _array([plain(one) for one in ids] if isinstance(ids, list) else ids)
    if array.ndim == 2 and len(array) == 1 and isinstance(row, Mapping):
        array = array[0]
    if array.shape == (0,):
        return np.zeros(0, np.int32)
    if array.dtype.kind in "US":
        _refuse_text(name, array.flat[0].item())
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"{name} must be integers [prompts, tokens], not {array.dtype} of shape {array.shape} a prompt."
        )
    return array


def _is_scalar(value: Any) -> bool:
    value = plain(value)
    return isinstance(value, int | float) or (isinstance(value, np.ndarray | np.generic) and not value.ndim)


def _shape(shapes: Sequence[tuple[int, ...]]) -> str:
    if len(set(shapes)) == 1:
        return str((len(shapes), *shapes[0]))
    return f"rows of {', '.join('x'.join(map(str, shape)) for shape in shapes[:8])}"


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
