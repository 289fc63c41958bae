"""Rules, combinations and policies as JSON: arrays with their shape, infinities as words, one error for all."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import inf
from typing import Any, Literal

import numpy as np

from exitkit.errors import UserError
from exitkit.files import DEPTH, first_fault, too_deep

Number = float | Literal["inf", "-inf"]
"""Type of a number in JSON; infinities are words."""

_WORDS = {inf: "inf", -inf: "-inf"}


def encoded(value: Any) -> Any:
    """Return a value for `json.dumps`: an array as its shape and values, infinity as "inf", as JSON has no such number.

    Args:
        value: a number, a text, None, an array, or a list or tuple of these.
    """
    if isinstance(value, np.ndarray):
        return {"shape": value.shape, "values": encoded(value.ravel().tolist())}
    if isinstance(value, list | tuple):
        return [encoded(part) for part in value]
    return _WORDS.get(value, value) if isinstance(value, float) else value


def decoded(value: Any) -> Any:
    """Return the arrays and tuples that were `encoded`; numbers and texts are unchanged.

    Raises:
        KeyError, TypeError, ValueError: the value is none that `encoded` returns.
    """
    if isinstance(value, dict):
        return np.array([float(number) for number in value["values"]]).reshape(value["shape"])
    return tuple(decoded(part) for part in value) if isinstance(value, list) else value


def parsed(text: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the table of a JSON text, whose fields must have the given types by pydantic's strict rules.

    Args:
        text: the text.
        fields: {name: type} of the fields that are needed; others are ignored.

    Raises:
        ValueError, KeyError: it is no such table; the message names the field.
    """
    # Imported when used: rules are mostly made, and not read.
    from pydantic import TypeAdapter, ValidationError

    table = json.loads(text)
    if not isinstance(table, dict):
        raise ValueError(f"it is a {type(table).__name__}, and no table")
    if key := too_deep(table):
        raise ValueError(f"{key} is nested more than {DEPTH} levels deep")
    for name, kind in fields.items():
        try:
            TypeAdapter(kind).validate_python(table[name], strict=True)
        except ValidationError as error:
            raise ValueError(f"{name}.{first_fault(error)}") from None
    return table


@contextmanager
def reading(text: str, what: str) -> Iterator[None]:
    """Turn errors of a damaged text into one message.

    Args:
        text: the text that is read in the block.
        what: what it should be, with its article: "a rule".

    Raises:
        UserError: the block failed, because the text has another form.
    """
    try:
        yield
    except UserError:
        raise
    except (AttributeError, TypeError, ValueError, LookupError, RecursionError) as error:
        shown = text[:60] if isinstance(text, str) else text
        raise UserError(f"{shown!r:.80} is not {what} ({error}); expected the text that its to_json returns") from None
