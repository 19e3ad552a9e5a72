"""The registry of attentions by name. Adding one takes one file with one decorator."""

import importlib.util
import inspect
import os.path
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from attention_zoo.core.base import InvalidOption
from attention_zoo.core.options import Option, options_of, takes_any

_CLASSES: dict[str, type[nn.Module]] = {}
AnyModule = TypeVar("AnyModule", bound=type[nn.Module])


def register(name: str) -> Callable[[AnyModule], AnyModule]:
    """Class decorator that registers an attention as ``name``; InvalidOption if the name is taken."""

    def remember(cls: AnyModule) -> AnyModule:
        if name in _CLASSES:
            raise InvalidOption(f"attention {name!r} is already registered; taken names: {', '.join(names())}")
        _CLASSES[name] = cls
        return cls

    return remember


def names() -> list[str]:
    """The names of the zoo's attentions, sorted: all registered ones except those with ``listed = False``."""
    return sorted(name for name, cls in _CLASSES.items() if getattr(cls, "listed", True))


def get(name: str) -> type[nn.Module]:
    """The class registered as ``name``; InvalidOption if there is none."""
    if name not in _CLASSES:
        raise InvalidOption(f"unknown attention {name!r}; valid: {', '.join(names())}")
    return _CLASSES[name]


def options(name: str) -> dict[str, Option]:
    """The options of the attention ``name``."""
    return options_of(get(name))


def build(name: str, *, dim: int, num_heads: int, impl: str = "auto", **values: Any) -> nn.Module:
    """Build the attention ``name``: a module from (b, h, w, dim) to (b, h, w, dim).

    Args:
        name: a registered name.
        dim: channels.
        num_heads: heads; must divide ``dim``.
        impl: the implementation; ``auto`` takes the fastest supported one.
        **values: options of that attention; omitted ones take their defaults.

    Raises:
        InvalidOption: the name, an option's name or its value is not valid; the message lists the valid ones.
    """
    cls, declared = get(name), options(name)
    for option, value in values.items():
        if option in declared:
            declared[option].check(value)
        elif not takes_any(cls):
            raise InvalidOption(f"{name!r} has no option {option!r}; valid: {', '.join(declared) or 'none'}")
    if "impl" in inspect.signature(cls).parameters:
        values["impl"] = impl
    elif impl not in ("auto", "reference"):
        raise InvalidOption(f"{name!r} has one implementation; valid impl: auto, reference")
    return cls(dim, num_heads, **values)


def load_plugin(path: str | Path) -> list[str]:
    """Import a Python file that registers attentions, and return the added names.

    Raises:
        InvalidOption: the file does not exist, fails to import, or registers nothing or a taken name.
    """
    path = Path(path).resolve()
    module_name = f"attention plugin {path}"
    if module_name in sys.modules:
        return []
    spec = importlib.util.spec_from_file_location(module_name, path)
    # Not path.is_file(), which raises before Python 3.14 if the name cannot be one of a file.
    if not os.path.isfile(path) or spec is None or spec.loader is None:
        raise InvalidOption(f"plugin {path}: not a Python file")
    before = set(_CLASSES)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
        if set(_CLASSES) == before:
            raise InvalidOption("it registers no attention; decorate a class with @register('its_name')")
    except (Exception, SystemExit) as problem:
        del sys.modules[module_name]
        for name in set(_CLASSES) - before:
            del _CLASSES[name]
        kind = "" if isinstance(problem, InvalidOption) else f"{type(problem).__name__}: "
        raise InvalidOption(f"plugin {path}: {kind}{problem}") from problem
    return sorted(set(_CLASSES) - before)
