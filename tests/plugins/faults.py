"""Attentions with one fault each, and one without.

Most fail on real tensors only, so that counting and predicting, which run on shapes alone, succeed.
"""

import signal

import torch
from torch import Tensor, nn

from attention_zoo import register


class Faulty(nn.Module):
    """A linear map of the channels, with a fault in :meth:`go_wrong`."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.mix = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        if type(x) is Tensor and not x.is_meta:
            self.go_wrong()
        return self.mix(x)

    def go_wrong(self) -> None:
        """Trigger the fault of the class."""


@register("fault_none")
class Healthy(Faulty):
    """Works."""


@register("fault_segfault")
class Segfault(Faulty):
    """Reads memory that it does not own."""

    def go_wrong(self) -> None:
        signal.raise_signal(signal.SIGSEGV)


@register("fault_loop")
class Loop(Faulty):
    """Never returns."""

    def go_wrong(self) -> None:
        while True:
            pass


@register("fault_hoard")
class Hoard(Faulty):
    """Allocates without end."""

    def go_wrong(self) -> None:
        hoard = []
        while True:
            hoard.append(torch.empty(16 << 20))


@register("fault_raise")
class Raise(Faulty):
    """Raises, with a message that is hard to write into a table."""

    def go_wrong(self) -> None:
        raise ValueError('wrong, and "quoted",\nover [/two] lines: ½')


class Wrong(Faulty):
    """Has an implementation beside the reference that is wrong in :meth:`fast`."""

    impls = ("reference", "fast")

    def __init__(self, dim: int, num_heads: int, impl: str = "auto") -> None:
        super().__init__(dim, num_heads)
        self.impl = impl

    def forward(self, x: Tensor) -> Tensor:
        out = self.mix(x)
        return out if self.impl == "reference" else self.fast(x, out)

    def fast(self, x: Tensor, out: Tensor) -> Tensor:
        """Spoil the output, or its gradient."""
        raise NotImplementedError


@register("fault_output")
class WrongOutput(Wrong):
    """One part in a thousand too large, which no look at the numbers would show; the gradients are right."""

    def fast(self, x: Tensor, out: Tensor) -> Tensor:
        return out + 0.001 * out.detach()


@register("fault_gradient")
class WrongGradient(Wrong):
    """Correct forward; half of the output has no gradient."""

    def fast(self, x: Tensor, out: Tensor) -> Tensor:
        kept, cut = out.chunk(2, dim=-1)
        return torch.cat([kept, cut.detach()], dim=-1)


@register("fault_no_gradient")
class NoGradient(Wrong):
    """Correct forward; the weights get no gradient."""

    def fast(self, x: Tensor, out: Tensor) -> Tensor:
        return out.detach() + 0 * x


@register("fault_without_gradients")
class WrongWithoutGradients(Wrong):
    """Correct with gradients, and wrong where none are required."""

    def fast(self, x: Tensor, out: Tensor) -> Tensor:
        return out if torch.is_grad_enabled() else 1.001 * out


@register("fault_nan")
class OneNaN(Wrong):
    """Right everywhere but in one channel, which is not a number; the gradients are right."""

    def fast(self, x: Tensor, out: Tensor) -> Tensor:
        spoiled = torch.zeros_like(out)
        spoiled[..., -1] = float("nan")
        return out + spoiled


@register("fault_right")
class Right(Wrong):
    """An implementation that sums in another order, and is right."""

    def fast(self, x: Tensor, out: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        left, right = self.mix.weight.chunk(2, dim=1)
        return second @ right.T + first @ left.T + self.mix.bias


@register("fault_count")
class Countless(Faulty):
    """Reads a number off its input, which has none when only shapes are counted."""

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x) * x.sum().item()


@register("fault_crash_on_shapes")
class CrashOnShapes(Faulty):
    """Crashes as soon as it is counted."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_meta:
            signal.raise_signal(signal.SIGSEGV)
        return self.mix(x)


@register("fault_says_nonsense")
class SaysNonsense(Faulty):
    """Declares a number of keys that is no number."""

    def kv_tokens_per_query(self, height: int, width: int) -> str:
        return "all of them"


@register("fault_names")
class Names(Faulty):
    """Has options with the names of the suite's columns and flags."""

    def __init__(self, dim: int, num_heads: int, *, topk: float = 0.5, status: str = "new", shift: int = -1) -> None:
        super().__init__(dim, num_heads)


@register("fault_flags")
class Flags(Faulty):
    """Has an option with the name of a flag of the profiler."""

    def __init__(self, dim: int, num_heads: int, *, mode: str = "fast") -> None:
        super().__init__(dim, num_heads)
