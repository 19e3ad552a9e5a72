"""What a registered attention may declare about itself, and the two ways it can refuse.

Only ``forward`` is required of an attention. Everything here is optional: what a class does not declare
is an empty cell in its rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from jaxtyping import Float
from torch import Tensor, nn

Impl = Literal["auto", "reference", "sdpa", "flex", "triton"]
_stood_for: str | None = None


class InvalidOption(ValueError):
    """A name or value the caller gave is wrong; the message says which, and lists the valid ones."""


class Unsupported(RuntimeError):
    """An implementation asked for by name cannot run this configuration; the message says why."""


@contextmanager
def standing_for(device: str) -> Iterator[None]:
    """Meanwhile tensors on shapes alone stand for tensors on a device of this type, whatever they say themselves."""
    global _stood_for
    before, _stood_for = _stood_for, device
    try:
        yield
    finally:
        _stood_for = before


def device_type(tensor: Tensor) -> str:
    """The type of the device that a tensor is on or stands for: for code that does not do the same on all of them."""
    return _stood_for or tensor.device.type


def only_memory_is_followed() -> bool:
    """Whether the step runs on shapes alone to see what memory it takes: what repeats itself takes no more."""
    return _stood_for is not None


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one forward pass of one image, split by what they are spent on."""

    projection: int = 0
    routing: int = 0
    attention: int = 0
    local_conv: int = 0
    other: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    def __add__(self, more: "Macs") -> "Macs":
        return Macs(*(getattr(self, f.name) + getattr(more, f.name) for f in fields(self)))


class Attention(nn.Module):
    """Base of the built-in attentions: NHWC in, NHWC out, the same height, width and channels.

    A subclass lists its ``impls`` from the plainest to the fastest and, where one of them cannot run every
    configuration, overrides :meth:`unsupported`.
    """

    attends_to: ClassVar[str] = ""
    """What a query attends to, in a few words."""
    citation: ClassVar[str] = ""
    """Authors, title, venue and year, then where in the publication: parted by commas."""
    impls: ClassVar[tuple[str, ...]] = ("reference",)
    exponent: float | None = None
    """The power of HW with which attention and routing grow, by theory."""
    smallest: ClassVar[dict[str, Any]] = {}
    """Options that make the smallest valid instance on an 8 x 8 grid, for tests."""
    by_stage: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Options that the publication sets stage by stage: their values in the four stages of a model."""
    listed: ClassVar[bool] = True
    """Whether it is an attention of the zoo; a bound that one sweep names, say, is built by name only."""

    def __init__(self, dim: int, num_heads: int, impl: Impl = "auto") -> None:
        super().__init__()
        if dim < 1 or num_heads < 1 or dim % num_heads:
            raise InvalidOption(
                f"dim={dim} is not divisible by num_heads={num_heads}; "
                f"valid num_heads: {', '.join(map(str, _divisors(dim)))}"
            )
        if impl not in ("auto", *self.impls):
            raise InvalidOption(f"impl={impl!r} is not one of: auto, {', '.join(self.impls)}")
        self.dim = dim
        self.num_heads = num_heads
        self.impl = impl

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        """Attend within each image of the batch."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward")

    def macs(self, height: int, width: int) -> Macs:
        """The analytic cost of one forward pass on a ``height x width`` grid, batch 1."""
        raise NotImplementedError(f"{type(self).__name__} declares no analytic cost")

    def kv_tokens_per_query(self, height: int, width: int) -> float | int:
        """How many key tokens one query attends to (the mean over queries where it varies)."""
        raise NotImplementedError(f"{type(self).__name__} declares no key count")

    def unsupported(self, impl: str, x: Tensor) -> str | None:
        """Why ``impl`` cannot run on ``x``, or None if it can."""
        return None

    def chosen_impl(self, x: Tensor) -> str:
        """The implementation that runs on ``x``: the one asked for, or with ``auto`` the fastest that can.

        Raises:
            Unsupported: an implementation was asked for by name and cannot run; nothing replaces it.
        """
        if self.impl != "auto":
            if reason := self.unsupported(self.impl, x):
                raise Unsupported(f"impl={self.impl!r}: {reason}")
            return self.impl
        return next(impl for impl in reversed(self.impls) if not self.unsupported(impl, x))


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, max(n, 0) + 1) if n % d == 0]
