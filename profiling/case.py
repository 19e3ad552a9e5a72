"""A case: what is measured, by names and numbers alone, so that it can be a key, a row and a message."""

from dataclasses import dataclass, fields
from typing import Any, get_args

import torch
from torch import nn

from attention_zoo import MODELS, Attention, Block, InvalidOption, build, get, options
from profiling.rows import KEY, as_text, fits
from profiling.workload import Dtype, Mode, Workload

KINDS = ("attention", "block", "model")
CHOICES = {"mode": get_args(Mode), "dtype": get_args(Dtype), "device": ("cpu", "cuda"), "kind": KINDS}
LARGEST = 2**16
"""Of any size: beyond it, numbers of elements overflow."""


@dataclass(frozen=True)
class Case:
    """One attention (or a block or model around one) at one size, in one mode, on one device.

    ``options`` are those of the attention, or for a model those of its blocks.

    Raises:
        InvalidOption: mode, dtype, device or kind is not a valid one, or a size or the seed is out of range.
    """

    name: str
    height: int
    width: int
    dim: int | None = 64
    num_heads: int | None = 2
    options: tuple[tuple[str, Any], ...] = ()
    kind: str = "attention"
    impl: str = "auto"
    mode: Mode = "forward"
    dtype: Dtype = "fp32"
    device: str = "cpu"
    batch: int = 1
    compiled: bool = False
    cuda_graph: bool = False
    deterministic: bool = False
    seed: int = 0
    replicate: int = 0

    def __post_init__(self) -> None:
        for field, valid in CHOICES.items():
            if getattr(self, field) not in valid:
                raise InvalidOption(f"{field}={getattr(self, field)!r} is not valid; valid: {', '.join(valid)}")
        for field in ("height", "width", "batch", "dim", "num_heads", "seed"):
            value, low, high = getattr(self, field), *((0, 2**32 - 1) if field == "seed" else (1, LARGEST))
            if value is not None and not low <= value <= high:
                raise InvalidOption(f"{field}={value} is not valid; valid: an integer from {low} to {high}")
        if self.kind == "model" and self.name not in MODELS:
            raise InvalidOption(f"unknown model {self.name!r}; valid: {', '.join(MODELS)}")

    def module(self) -> nn.Module:
        """Build it, on whatever device is the current default."""
        given = dict(self.options)
        if self.kind == "model":
            module: nn.Module = MODELS[self.name](impl=self.impl, **given)
        elif self.kind == "block":
            # With the attention's own defaults, which the row states, not those of Block.
            given = self.all_options()
            module = Block(self._dim, num_heads=self._heads, attention=self.name, impl=self.impl, **given)
        else:
            module = build(self.name, dim=self._dim, num_heads=self._heads, impl=self.impl, **given)
        return module.train(self.mode == "forward_backward")

    @property
    def _dim(self) -> int:
        return self.dim or 0

    @property
    def _heads(self) -> int:
        return self.num_heads or 0

    def shape(self) -> tuple[int, int, int, int]:
        """Of the input: NHWC for an attention, NCHW for a block or a model."""
        if self.kind == "attention":
            return self.batch, self.height, self.width, self._dim
        return self.batch, 3 if self.kind == "model" else self._dim, self.height, self.width

    def workload(self, device: str) -> Workload:
        """Module, input and step on ``device``, or on ``meta`` for shapes alone; seeded."""
        torch.manual_seed(self.seed + self.replicate)
        dtype = torch.float64 if self.dtype == "fp64" else torch.float32
        with torch.device("meta" if device == "meta" else "cpu"):
            module, x = self.module(), torch.randn(self.shape())
        module, x = module.to(dtype=dtype), x.to(dtype=dtype)
        if device not in ("meta", "cpu"):
            module, x = module.to(device), x.to(device)
        return Workload(module, x, self.mode, self.dtype, self.deterministic, input_gradient=self.kind != "model")

    def implementation(self, work: Workload) -> str:
        """Which implementations run: the attentions' own answers, or what was asked for."""
        found = set()
        for module in work.module.modules():
            if isinstance(module, Attention):
                # As the step would ask: what a kernel can run depends on gradients and on autocast.
                with work.settings(), torch.set_grad_enabled(self.mode == "forward_backward"):
                    found.add(module.chosen_impl(work.x))
            elif len(getattr(module, "impls", ())) > 1:
                # It does not say which of them "auto" runs: so it is not taken for the reference.
                found.add(self.impl)
        return " ".join(sorted(found)) or ("reference" if self.impl == "auto" else self.impl)

    def key(self, sweep: str, device_name: str) -> tuple[str, ...]:
        """What makes its row unique in a results file, in the words of the CSV."""
        who = self.who(sweep, device_name)
        return tuple(as_text(who.get(column)) for column in KEY)

    def who(self, sweep: str, device_name: str) -> dict[str, Any]:
        """The key columns of its row."""
        who = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("options", "impl")}
        if self.kind == "model":
            who["dim"] = who["num_heads"] = None
        chosen = self.all_options()
        who |= {name: value for name, value in chosen.items() if _has_column(name, value)}
        rest = {name: value for name, value in chosen.items() if not _has_column(name, value)}
        who["other_options"] = " ".join(f"{name}={as_text(value)}" for name, value in rest.items())
        return who | {"sweep": sweep, "impl_requested": self.impl, "device_name": device_name}

    def all_options(self) -> dict[str, Any]:
        """The options with their defaults where not given; defaults of rare options, without a column, left out."""
        if self.kind == "model":
            return dict(self.options)
        defaults = {name: option.default for name, option in options(self.name).items() if name in OPTION_COLUMNS}
        return defaults | dict(self.options)

    def __str__(self) -> str:
        chosen = " ".join(f"{name}={value}" for name, value in self.options)
        size = f"{self.height}x{self.width}" + (f"x{self.dim}" if self.kind != "model" else "")
        plain = ("auto", "reference")
        extras = [self.impl if self.impl not in plain else "", self.dtype if self.dtype != "fp32" else ""]
        extras += ["compiled" if self.compiled else "", "CUDA graph" if self.cuda_graph else ""]
        extras += [f"batch {self.batch}" if self.batch > 1 else ""]
        return " ".join(filter(None, [self.name, size, chosen, self.mode, *extras]))


OPTION_COLUMNS = set(KEY) - {f.name for f in fields(Case)} - {"sweep", "impl_requested", "other_options", "device_name"}


def _has_column(name: str, value: Any) -> bool:
    # A plugin may call anything by the name of a column.
    return name in OPTION_COLUMNS and fits(name, value)


def available_impls(name: str) -> tuple[str, ...]:
    """The implementations that the attention ``name`` declares, the plainest first."""
    return getattr(get(name), "impls", ("reference",))
