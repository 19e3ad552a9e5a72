"""Is it right? A fast implementation against the reference in fp64: output and every gradient.

The tolerance is the reference's own error when it runs in the cell's dtype, with room to spare, so that no
number has to be chosen per dtype, per size or per attention.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attention_zoo import Unsupported
from profiling.case import Case
from profiling.workload import Workload

ROOM = 4.0
"""How many times the reference's own error an implementation may have: it sums in another order."""
ROUNDING = 4 * torch.finfo(torch.float32).eps
"""The least that the reference's own error counts as: by luck, or by summing pairwise, it can be smaller."""
LARGEST_TOKENS = 64 * 64
"""A larger grid is checked at a smaller size of the same shape, and of a large batch a part: the fp64 reference would
not fit."""


@dataclass(frozen=True)
class Agreement:
    """The largest relative error, where it was found, and the error allowed there."""

    error: float
    tolerance: float
    where: str

    @property
    def ok(self) -> bool:
        """Whether the error is within the tolerance; what is not finite never is."""
        return math.isfinite(self.error) and self.error <= self.tolerance

    @property
    def share(self) -> float:
        """The error as a share of what is allowed."""
        return self.error / self.tolerance


def check(case: Case) -> Agreement | None:
    """Compare the case's implementation with the fp64 reference; None if it is the reference, run as it is.

    Both modes check the gradients too: a wrong backward must not hide behind a fast forward. A forward step is checked
    once more without gradients, as it will be timed; and only so where there is no backward at all.
    """
    as_it_is = not (case.compiled or case.cuda_graph)
    if case.impl == "reference" and as_it_is:
        return None
    height, width = _small_grid(case)
    batch = case.batch if case.kind == "model" else min(case.batch, max(2, LARGEST_TOKENS // (height * width)))
    small = replace(case, mode="forward_backward", height=height, width=width, batch=batch)
    fast = small.workload(case.device)
    try:
        impl = small.implementation(fast)
    except Unsupported:
        if case.mode != "forward":
            raise
        small = replace(small, mode="forward")
        fast = small.workload(case.device)
        impl = small.implementation(fast)
    if impl == "reference" and as_it_is:
        return None
    found = _compare(small, fast)
    if case.mode == small.mode or not found.ok:
        return found
    # What needs no gradient may be other code.
    small = replace(small, mode="forward")
    return max(found, _compare(small, small.workload(case.device)), key=lambda one: one.share)


def _compare(case: Case, fast: Workload) -> Agreement:
    if case.compiled:
        fast.compile()
    wanted = _results(_reference(case, fast, "fp64"))
    allowed = _results(_reference(case, fast, case.dtype))
    found = _results(fast, case.cuda_graph)
    worst = Agreement(0.0, 1.0, "")
    for name, exact in wanted.items():
        error, own = _distance(found.get(name), exact), _distance(allowed[name], exact)
        tolerance = ROOM * max(own, ROUNDING)
        if error == math.inf:
            return Agreement(error, tolerance, name)
        worst = max(worst, Agreement(error, tolerance, name), key=lambda one: one.share)
    return worst


def _small_grid(case: Case) -> tuple[int, int]:
    if case.kind == "model" or case.height * case.width <= LARGEST_TOKENS:
        return case.height, case.width
    shrink = (LARGEST_TOKENS / (case.height * case.width)) ** 0.5
    chosen = case.all_options()
    steps = [chosen[name] for name in ("n_win", "window_size") if isinstance(chosen.get(name), int)]
    step = max(steps, default=1)
    return tuple(max(step, int(side * shrink) // step * step) for side in (case.height, case.width))  # type: ignore[return-value]


def _reference(case: Case, fast: Workload, dtype: str) -> Workload:
    """The reference with the fast workload's weights, input and output gradient."""
    precise = replace(case, impl="reference", dtype=dtype, compiled=False, cuda_graph=False).workload(case.device)  # type: ignore[arg-type]
    precise.module.load_state_dict(fast.module.state_dict())
    x, grad = fast.x.detach().to(precise.x.dtype), None if fast.grad is None else fast.grad.to(precise.x.dtype)
    return Workload(
        precise.module, x, precise.mode, precise.dtype, case.deterministic, grad, input_gradient=case.kind != "model"
    )


def _results(work: Workload, cuda_graph: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(0)
    with work.settings(), work.replayed() if cuda_graph else nullcontext():
        out = work.step()
    output = "output" if work.mode == "forward_backward" else "output without gradients"
    results = {output: out.detach(), "gradient of the input": work.x.grad}
    results |= {f"gradient of {name}": p.grad for name, p in work.module.named_parameters()}
    return {name: t.double().cpu() for name, t in results.items() if t is not None}


def _distance(found: Tensor | None, exact: Tensor) -> float:
    """Relative Euclidean distance; of a tensor that is zero in exact arithmetic, the absolute one.

    A gradient that is not there counts as zero, and what is not finite is infinitely far away.
    """
    scale = exact.norm().item()
    difference = exact if found is None else found - exact
    distance = (difference.norm() / (scale if scale > 1e-9 else 1.0)).item()
    return distance if math.isfinite(distance) else math.inf
