"""The one check of integers that come from outside."""

from __future__ import annotations

import numpy as np


def checked_int(value: object, low: int, high: int, name: str, expected: str) -> int:
    """`value` as an int, if it is one from `low` to `high`: a Python int or a NumPy integer, no bool, no float, no time span.

    Raises:
        ValueError: it is not; the message is "name: value, expected ...".
    """
    is_int = isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.timedelta64))
    if not is_int or not low <= int(value) <= high:  # type: ignore[call-overload]
        raise ValueError(f"{name}: {value!r}, expected {expected}")
    return int(value)  # type: ignore[call-overload]


def checked_flag(value: object, name: str) -> bool:
    """`value` as a bool, if it is one, or 0 or 1.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    return bool(checked_int(value, 0, 1, name, "True or False"))


WORD = (1 << 64) - 1
