"""volatility3's Intel layer, a walker in Python for memory images."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import numpy as np


def available() -> bool:
    """Whether volatility3 is installed."""
    return importlib.util.find_spec("volatility3") is not None


def translator(image: bytes, cr3: int) -> Callable[[int], int]:
    """Translate by the page tables of a 4-level image that begins at address 0."""
    from volatility3.framework import contexts
    from volatility3.framework.layers import intel, physical

    context = contexts.Context()
    context.add_layer(physical.BufferDataLayer(context, "physical", "physical", image))
    context.config["virtual.memory_layer"] = "physical"
    context.config["virtual.page_map_offset"] = cr3
    layer = intel.Intel32e(context, "virtual", "virtual")
    return lambda gva: layer._translate(gva)[0]  # without its check that the page lies in the image, which holds tables only


def translate_all(translate: Callable[[int], int], gvas: np.ndarray) -> np.ndarray:
    """Translate one after another, as its users do."""
    return np.array([translate(gva) for gva in gvas.tolist()], np.uint64)
