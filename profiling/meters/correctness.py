"""Correctness: output and every gradient of an implementation against the reference in fp64.

The tolerance is a multiple of the reference's own error in the cell's dtype, so no threshold is chosen per dtype,
size or attention.

In a routing attention, rounding can change routes, which causes far larger errors. So the references use the
implementation's routes, and the share of routes that fp64 would choose differently is checked separately.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from attention_zoo import Attention, Unsupported
from profiling.cases.case import Case
from profiling.cases.workload import Workload

ROOM = 4.0
"""Allowed multiple of the reference's own error, since an implementation sums in another order."""
ROUNDING = 4 * torch.finfo(torch.float32).eps
"""Lower bound for the reference's own error, which can be smaller by chance or by pairwise summation."""
ZERO = 1e-8
"""A tensor of this share of the largest norm, or less, is zero but for rounding."""
REPEATS = 8
"""Further inputs if a check fails; the errors of all are judged as one. In a gradient of one or two numbers, such as a
scale per head, the reference's own error on one input can be small by chance."""
TIED = 1e-9
"""Routes are equally good if their weights in fp64 differ by this share or less, as those of regions of padding do."""
FEW_FLIPPED = 0.02
"""Share of routes that may differ from fp64's because of near ties, in addition to ROOM times the reference's own
share. Two routes may always differ, since a share of few routes is not informative."""
MOST_FLIPPED = 0.1
"""Upper bound of that share, unless the reference's own share is larger."""
LARGEST_TOKENS = 64 * 64
"""A larger grid is checked at a smaller size of the same shape, and a large batch in part, so that the fp64 reference
fits."""
FEWEST_PIXELS = 8 * 32 * 32
"""Pixels of a model's batch, at least: eight places in its last stage. Its batch normalisations need more than one, and
over two their gradients are rounding errors."""


Routes = dict[str, tuple[Tensor, Tensor]]
"""Per routing module, by name: the regions that each region chooses (b, p, k), and its weights of all (b, p, r)."""


@dataclass(frozen=True)
class Agreement:
    """The largest relative error, where it was found, and the error allowed there.

    Attributes:
        flipped: share of the routes that fp64 would choose differently; None without routing.
        flips_allowed: maximum of ``flipped``.
    """

    error: float
    tolerance: float
    where: str
    flipped: float | None = None
    flips_allowed: float = 1.0

    @property
    def ok(self) -> bool:
        """Whether error and flipped routes are within their limits; a non-finite error is not."""
        return math.isfinite(self.error) and self.error <= self.tolerance and not self._flips_too_much

    @property
    def share(self) -> float:
        """The larger of error / tolerance and flipped routes / allowed flips."""
        return max(self.error / self.tolerance, (self.flipped or 0.0) / self.flips_allowed)

    @property
    def reason(self) -> str:
        """Why the check failed, if not ok."""
        if self._flips_too_much:
            return f"{self.flipped:.2g} of its routes are not those of fp64; {self.flips_allowed:.2g} may differ"
        return f"{self.where} is off by {self.error:.2g}"

    @property
    def _flips_too_much(self) -> bool:
        return self.flipped is not None and self.flipped > self.flips_allowed


def check(case: Case) -> Agreement | None:
    """Compare the case's implementation with the fp64 reference; None for the unmodified reference itself.

    Both modes check the gradients too, to detect a wrong backward pass. A forward case is checked again without
    gradients, as it is timed. Without a backward pass, only this second check runs. A failed check is repeated on
    REPEATS more inputs, and all decide.
    """
    as_it_is = not (case.compiled or case.cuda_graph)
    if case.impl == "reference" and as_it_is:
        return None
    height, width = _small_grid(case)
    batch = min(case.batch, max(2, LARGEST_TOKENS // (height * width)))
    if case.kind == "model":
        batch = max(batch, FEWEST_PIXELS // (height * width))
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
    result = _compare(small, fast)
    if case.mode == small.mode or not result.ok:
        return result
    # Other code may run without gradients.
    small = replace(small, mode="forward")
    return max(result, _compare(small, small.workload(case.device)), key=lambda one: one.share)


def _compare(case: Case, fast: Workload) -> Agreement:
    routing = {name: module for name, module in fast.module.named_modules() if _routes(module)}
    for module in routing.values():
        module.keep_routes = True
    if case.compiled:
        fast.compile()
    references = [_reference(case, fast, dtype) for dtype in ("fp64", case.dtype)]

    def compare() -> tuple[list[str], Tensor, Tensor]:
        result = _results(fast, case.cuda_graph)
        # With a CUDA graph, the routes exist only after the replay.
        taken: dict[str, Tensor] = {name: module.kept_routes for name, module in routing.items()}
        (expected, chosen), (allowed, own) = (_on_routes(reference, taken) for reference in references)
        missed = [_missed(routes, chosen) for routes in (taken, {name: index for name, (index, _) in own.items()})]
        return list(expected), _squares(expected, result, allowed), torch.tensor(missed)

    names, *first = compare()
    agreement = _judge(names, *first)
    if agreement.ok or not math.isfinite(agreement.error):
        return agreement
    # Not the seed itself, of which the weights are made.
    generator = torch.Generator(fast.x.device).manual_seed(case.seed + 1)
    all_inputs = [tuple(first)]
    for _ in range(REPEATS):
        _renew(fast, references, generator)
        all_inputs.append(compare()[1:])
    return _judge(names, *(torch.stack(each).sum(0) for each in zip(*all_inputs, strict=True)))


def _renew(fast: Workload, references: list[Workload], generator: torch.Generator) -> None:
    """Fill inputs and output gradients with new numbers, in place, so that compiled steps stay valid."""
    with torch.no_grad():
        for source, *copies in zip(*((work.x, work.grad) for work in (fast, *references)), strict=True):
            if source is not None:
                source.normal_(generator=generator)
                for copy in copies:
                    copy.copy_(source)


def _squares(expected: dict[str, Tensor], *others: dict[str, Tensor]) -> Tensor:
    """Per expected tensor, its squared norm and those of the others' differences from it; a missing one is zero."""
    squares = []
    for name, tensor in expected.items():
        differences = (other[name] - tensor if name in other else tensor for other in others)
        squares += [each.square().sum() for each in (tensor, *differences)]
    return torch.stack(squares).unflatten(0, (len(expected), -1))


def _judge(names: list[str], squares: Tensor, missed: Tensor) -> Agreement:
    """The result with the largest error relative to its tolerance, and the routes.

    Errors are relative to the tensor's norm. If that is ZERO, as queries' gradients are where there is one key, they
    are relative to the largest norm of all. A non-finite error counts as infinite.

    Args:
        squares: per name, the squared norms of the exact tensor, of the error and of the reference's own error.
        missed: how many of fp64's routes were not taken, and of how many; then the same of the reference's own routes.
    """
    norms = squares.sqrt().tolist()
    largest = max(norm for norm, _, _ in norms)
    worst = Agreement(0.0, 1.0, "")
    for name, (norm, *distances) in zip(names, norms, strict=True):
        unit = norm if norm > ZERO * largest else largest or 1.0
        error, own = (distance / unit if math.isfinite(distance / unit) else math.inf for distance in distances)
        tolerance = ROOM * max(own, ROUNDING)
        if error == math.inf:
            worst = Agreement(error, tolerance, name)
            break
        worst = max(worst, Agreement(error, tolerance, name), key=lambda one: one.share)
    (lost, count), (lost_by_own, _) = missed.tolist()
    if not count:
        return worst
    share_of_own = lost_by_own / count
    most = min(ROOM * share_of_own + FEW_FLIPPED, max(MOST_FLIPPED, share_of_own))
    return replace(worst, flipped=lost / count, flips_allowed=max(most, 2 / count))


def _routes(module: nn.Module) -> bool:
    """Whether a module can keep its routes and accept imposed routes."""
    return hasattr(module, "keep_routes") and hasattr(getattr(module, "router", None), "imposed")


def _on_routes(work: Workload, taken: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Routes]:
    """The results of a reference with imposed routes, and the routes that it would choose itself."""
    chosen: Routes = {}
    with ExitStack() as stack:
        for name, routes in taken.items():
            stack.enter_context(_imposed(name, work.module.get_submodule(name).router, routes, chosen))  # type: ignore[arg-type]
        return _results(work), chosen


@contextmanager
def _imposed(name: str, router: nn.Module, routes: Tensor, chosen: Routes) -> Iterator[None]:
    """Impose routes on a router within the context; store its own choice and its weights in ``chosen``."""

    def choose(router: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor], out: object) -> None:
        everywhere = torch.arange(args[1].shape[1], device=routes.device).expand(*routes.shape[:2], -1)
        with torch.no_grad():
            router.imposed = None  # type: ignore[assignment]
            own, _ = router.forward(*args, **named)
            router.imposed = everywhere
            chosen[name] = own, router.forward(*args, **named)[1]
        router.imposed = routes

    router.imposed = routes
    hook = router.register_forward_hook(choose, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
        router.imposed = None  # type: ignore[assignment]


def _missed(routes: Mapping[str, Tensor], exact: Routes) -> tuple[int, int]:
    """How many of the exact routes are not taken, and of how many that count: not those of zero weight (to padding).

    Of routes that are TIED for the last places, any may be taken.
    """
    missed = total = 0
    for name, (index, weights) in exact.items():
        taken = torch.zeros_like(weights, dtype=torch.bool).scatter(-1, routes[name], True)
        last = weights.gather(-1, index).amin(-1, keepdim=True)
        better, good = weights > last * (1 + TIED), weights >= last * (1 - TIED)
        places = index.shape[-1] - better.sum(-1)
        tied = (good & ~better & taken).sum(-1)
        lost = (places - tied).clamp(min=0) * (last[..., 0] > 0)
        missed += int((better & ~taken).sum() + lost.sum())
        total += int(better.sum() + (places * (last[..., 0] > 0)).sum())
    return missed, total


def _small_grid(case: Case) -> tuple[int, int]:
    if case.kind == "model" or case.height * case.width <= LARGEST_TOKENS:
        return case.height, case.width
    shrink = (LARGEST_TOKENS / (case.height * case.width)) ** 0.5
    with torch.device("meta"):
        module = case.module()
    attention = getattr(module, "attn", module)
    step = attention.grid_multiple(case.height, case.width) if isinstance(attention, Attention) else 1
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
    return {name: t.double() for name, t in results.items() if t is not None}
