"""A case: what is measured. It holds only names and numbers, so it serves as key, row and message."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, get_args

import torch
from torch import nn

from attention_zoo import MODELS, Attention, Block, InvalidOption, build, get, options
from attention_zoo.models.biformer import ATTENTIONS
from profiling.cases.workload import PARAMETERS, Dtype, Mode, Workload
from profiling.schema.row import KEY, as_text
from profiling.schema.row import KINDS as COLUMN_KINDS

KINDS = ("attention", "block", "model")
CHOICES = {"mode": get_args(Mode), "dtype": get_args(Dtype), "device": ("cpu", "cuda"), "kind": KINDS}
LARGEST = 2**16
"""Maximum of any size; beyond it, element counts overflow."""
PUBLISHED = "published"
"""The word for a stage that keeps the attention of the published model."""


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
        """Build the module on the current default device."""
        args = dict(self.options)
        if self.kind == "model":
            module: nn.Module = MODELS[self.name](impl=self.impl, **args)
        elif self.kind == "block":
            # The row states the attention's own defaults, so use them instead of Block's.
            args = self.all_options()
            module = Block(self._dim, num_heads=self._heads, attention=self.name, impl=self.impl, **args)
        else:
            module = build(self.name, dim=self._dim, num_heads=self._heads, impl=self.impl, **args)
        return module.train(self.mode == "forward_backward")

    @property
    def needs_fresh_process(self) -> bool:
        """Whether its step changes the state of the process, or needs a process in its initial state.

        The compiler, FlexAttention's included, stops compiling after some shapes and keeps compiled code. cuBLAS
        reads its determinism setting when CUDA starts.
        """
        return self.may_compile or self.deterministic

    @property
    def may_compile(self) -> bool:
        """Whether its step may run PyTorch's compiler, on request or through FlexAttention."""
        if self.compiled or self.impl == "flex":
            return True
        inside = dict(self.options).get("attention") if self.kind == "model" else self.name
        names = [inside] if isinstance(inside, str) else filter(None, inside or ())
        return self.impl == "auto" and any(available_impls(name)[-1:] == ("flex",) for name in names)

    @property
    def _dim(self) -> int:
        return self.dim or 0

    @property
    def _heads(self) -> int:
        return self.num_heads or 0

    def shape(self) -> tuple[int, int, int, int]:
        """Input shape: NHWC for an attention, NCHW for a block or a model."""
        if self.kind == "attention":
            return self.batch, self.height, self.width, self._dim
        return self.batch, 3 if self.kind == "model" else self._dim, self.height, self.width

    def workload(self, device: str) -> Workload:
        """Seeded module, input and step on ``device``; ``meta`` gives shapes only."""
        torch.manual_seed(self.seed + self.replicate)
        dtype = PARAMETERS.get(self.dtype, torch.float32)
        with torch.device("meta" if device == "meta" else "cpu"):
            module, x = self.module(), torch.randn(self.shape())
        module, x = module.to(dtype=dtype), x.to(dtype=dtype)
        if device not in ("meta", "cpu"):
            module, x = module.to(device), x.to(device)
        return Workload(module, x, self.mode, self.dtype, self.deterministic, input_gradient=self.kind != "model")

    def implementation(self, work: Workload) -> str:
        """Implementations that run, from each attention's ``chosen_impl``, else as requested."""
        result = set()
        for module in work.module.modules():
            if isinstance(module, Attention):
                # Under the step's settings: kernel support depends on gradients and autocast.
                with work.settings(), torch.set_grad_enabled(self.mode == "forward_backward"):
                    result.add(module.chosen_impl(work.x))
            elif len(getattr(module, "impls", ())) > 1:
                # The impl that "auto" runs is unknown here, so do not assume the reference.
                result.add(self.impl)
        return " ".join(sorted(result)) or ("reference" if self.impl == "auto" else self.impl)

    def key(self, sweep: str, device_name: str) -> tuple[str, ...]:
        """The unique key of its row in a results file, as CSV text."""
        key_columns = self.key_columns(sweep, device_name)
        return tuple(as_text(key_columns.get(column)) for column in KEY)

    def key_columns(self, sweep: str, device_name: str) -> dict[str, Any]:
        """The key columns of its row."""
        key_columns = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("options", "impl")}
        if self.kind == "model":
            key_columns["dim"] = key_columns["num_heads"] = None
        chosen = self.all_options()
        if self.kind == "model" and "attention" in chosen:
            chosen["attention"] = stages_as_text(chosen["attention"])
        key_columns |= {name: value for name, value in chosen.items() if _has_column(name, value)}
        rest = {name: value for name, value in chosen.items() if not _has_column(name, value)}
        key_columns["other_options"] = " ".join(f"{name}={as_text(value)}" for name, value in rest.items())
        return key_columns | {"sweep": sweep, "impl_requested": self.impl, "device_name": device_name}

    def all_options(self) -> dict[str, Any]:
        """The options, with defaults for those not given; options without a column get no default."""
        if self.kind == "model":
            return dict(self.options)
        defaults = {name: option.default for name, option in options(self.name).items() if name in OPTION_COLUMNS}
        return defaults | dict(self.options)

    def __str__(self) -> str:
        chosen = " ".join(
            f"{name}={value if name != 'attention' else stages_as_text(value)}" for name, value in self.options
        )
        size = f"{self.height}x{self.width}" + (f"x{self.dim}" if self.kind != "model" else "")
        unmodified = ("auto", "reference")
        extras = [self.impl if self.impl not in unmodified else "", self.dtype if self.dtype != "fp32" else ""]
        extras += ["compiled" if self.compiled else "", "CUDA graph" if self.cuda_graph else ""]
        extras += [f"batch {self.batch}" if self.batch > 1 else ""]
        return " ".join(filter(None, [self.name, size, chosen, self.mode, *extras]))


OPTION_COLUMNS = set(KEY) - {f.name for f in fields(Case)} - {"sweep", "impl_requested", "other_options", "device_name"}


def _has_column(name: str, value: Any) -> bool:
    # A plugin's option may share its name with a column.
    return name in OPTION_COLUMNS and _fits(name, value)


def stages_as_text(attention: str | Sequence[str | None] | None) -> str | None:
    """The attentions of a model as one word: the name for all stages, or four names with commas between them."""
    if attention is None or isinstance(attention, str):
        return attention
    return ",".join(name or PUBLISHED for name in attention)


def stages_from_text(text: str) -> str | tuple[str | None, ...] | None:
    """The argument ``attention`` of a model that :func:`stages_as_text` wrote as ``text``; names are not checked."""
    names = [None if name.strip() == PUBLISHED else name.strip() for name in text.split(",")]
    return names[0] if len(names) == 1 else tuple(names)


def impls_of_model(attention: str | Sequence[str | None] | None) -> tuple[str, ...]:
    """The implementations that all attentions of a model have, the plainest first; InvalidOption if one is unknown."""
    every = [attention] if attention is None or isinstance(attention, str) else attention
    inside = dict.fromkeys(one for name in every for one in (ATTENTIONS if name is None else (name,)))
    first, *rest = map(available_impls, inside)
    return tuple(impl for impl in first if all(impl in others for others in rest))


def available_impls(name: str) -> tuple[str, ...]:
    """The implementations that the attention ``name`` declares, the plainest first."""
    return getattr(get(name), "impls", ("reference",))


def _fits(column: str, value: Any) -> bool:
    """Whether a value is valid in a column; only integer and boolean columns restrict it."""
    kind = COLUMN_KINDS[column]
    if value is None or kind not in ("int64", "boolean"):
        return True
    return isinstance(value, bool) if kind == "boolean" else type(value) is int and value >= 0
