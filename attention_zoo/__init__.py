"""Vision attentions behind one interface: NHWC in, NHWC out.

This file imports every module of ``attentions`` and ``baselines``, so adding an attention takes one file with a
``@register`` in it.
"""

import importlib
import pkgutil

from attention_zoo import attentions, baselines
from attention_zoo.core.base import Attention, InvalidOption, Macs, Unsupported
from attention_zoo.core.registry import build, get, load_plugin, names, options, register

for _package in (attentions, baselines):
    for _module in pkgutil.iter_modules(_package.__path__):
        importlib.import_module(f"{_package.__name__}.{_module.name}")

from attention_zoo.models.biformer import MODELS  # noqa: E402
from attention_zoo.models.block import Block  # noqa: E402

__all__ = [
    "MODELS", "Attention", "Block", "InvalidOption", "Macs", "Unsupported",
    "build", "get", "load_plugin", "names", "options", "register",
]  # fmt: skip
