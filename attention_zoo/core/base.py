"""Optional declarations of a registered attention, and the two exceptions it can raise.

Only ``forward`` is required. A missing declaration is an empty cell in the attention's rows.
"""

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from jaxtyping import Float
from torch import Tensor, nn

Impl = Literal["auto", "reference", "sdpa", "flex", "triton"]
FAMILIES = ("full", "local", "axial", "pooled", "sampled", "routed", "linear", "channel", "other")
"""Which keys a query gets: all; near ones; rows and columns; a sub-sampled grid; spaced or learned points; those that
the content chooses; a summary of all; channels instead of tokens."""


class InvalidOption(ValueError):
    """The caller passed an invalid name or value; the message gives it and lists the valid ones."""


class Unsupported(RuntimeError):
    """An explicitly requested implementation cannot run this configuration; the message gives the reason."""


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one forward pass of one image, split by purpose.

    ``shared`` is what all images of a batch have in common, such as a network of relative positions.
    """

    projection: int = 0
    routing: int = 0
    attention: int = 0
    local_conv: int = 0
    other: int = 0
    shared: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    def __add__(self, more: "Macs") -> "Macs":
        return Macs(*(getattr(self, f.name) + getattr(more, f.name) for f in fields(self)))

    def of_batch(self, images: int) -> "Macs":
        """Those of one forward pass of several images."""
        return Macs(*((1 if f.name == "shared" else images) * getattr(self, f.name) for f in fields(self)))


class Attention(nn.Module):
    """Base of the built-in attentions: NHWC in, NHWC out, the same height, width and channels.

    A subclass lists its ``impls``, ``reference`` first and the fastest last. It overrides :meth:`unsupported` if one
    of them cannot run every configuration.
    """

    family: ClassVar[str] = "other"
    """One of FAMILIES: the group in tables; figures give each group its colours."""
    attends_to: ClassVar[str] = ""
    """What a query attends to, in a few words."""
    citation: ClassVar[str] = ""
    """Authors, title, venue and year, then the place in the publication, separated by commas."""
    equation: ClassVar[str] = ""
    """What it computes, in the publication's terms, on one line."""
    left_open: ClassVar[str] = ""
    """Choices that the publication leaves open, each with the choice made here: ``what: choice; what: choice``."""
    departs: ClassVar[str] = ""
    """In what it departs from the authors' code; "nothing" if in nothing."""
    impls: ClassVar[tuple[str, ...]] = ("reference",)
    exponent: float | None = None
    """The theoretical exponent of HW in the cost of attention and routing."""
    minimal_options: ClassVar[dict[str, Any]] = {}
    """Options that make the smallest valid instance on an 8 x 8 grid, for tests."""
    by_stage: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Options that the publication sets per stage: their values in the four stages of a model."""
    listed: ClassVar[bool] = True
    """Whether it is an attention of the zoo. If not, it is only built by name, as for a bound used in one sweep."""

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
        """The number of key tokens per query (the mean over queries if it varies)."""
        raise NotImplementedError(f"{type(self).__name__} declares no key count")

    def grid_multiple(self, height: int, width: int) -> int:
        """The divisor that both sides of a smaller grid must have, so that ``impl`` runs on it as on this grid."""
        return 1

    def unsupported(self, impl: str, x: Tensor) -> str | None:
        """Why ``impl`` cannot run on ``x``, or None if it can."""
        return None

    def chosen_impl(self, x: Tensor) -> str:
        """The implementation that runs on ``x``: the requested one, or with ``auto`` the fastest supported one.

        Raises:
            Unsupported: the explicitly requested implementation cannot run; there is no fallback.
        """
        if self.impl != "auto":
            if reason := self.unsupported(self.impl, x):
                raise Unsupported(f"impl={self.impl!r}: {reason}")
            return self.impl
        return next(impl for impl in reversed(self.impls) if not self.unsupported(impl, x))


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, max(n, 0) + 1) if n % d == 0]
