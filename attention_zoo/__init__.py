"""Vision attentions behind one interface: NHWC in, NHWC out.

Every module of this package is imported here, so that a file with a ``@register`` in it is all it takes to
add an attention.
"""

import importlib
import pkgutil

from attention_zoo.contract import Attention, InvalidOption, Macs, Unsupported
from attention_zoo.registry import build, get, load_plugin, names, options, register

for _module in pkgutil.iter_modules(__path__):
    if _module.name != "__main__":
        importlib.import_module(f"{__name__}.{_module.name}")

from attention_zoo.block import Block  # noqa: E402
from attention_zoo.models import MODELS  # noqa: E402

__all__ = [
    "MODELS", "Attention", "Block", "InvalidOption", "Macs", "Unsupported",
    "build", "get", "load_plugin", "names", "options", "register",
]  # fmt: skip
