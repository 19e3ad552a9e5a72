"""Which storages are alive at every operator of a step, so that predictions at several shapes can be compared.

The operators of a step are the same at every shape; only the sizes of their storages differ.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from profiling.cases.case import Case
from profiling.meters import cpu_scratch, cuda_scratch, macs
from profiling.meters.cuda_scratch import ColumnSum, TiledBackward
from profiling.meters.operator_call import Call
from profiling.meters.peak_memory import Allocations, predict

VARIANTS = (("cpu", "fp32"), ("cuda", "fp32"), ("cuda", "bf16"))
"""Devices and dtypes for which memory is predicted; half precision on a CPU is not predictable."""
MODES = ("forward", "forward_backward")
NEVER = 1 << 30


@dataclass(frozen=True)
class Timeline:
    """The storages of one step, in the order in which they appear.

    Attributes:
        sizes: bytes of each.
        lifetimes: for each, the first moment at which it is alive and the first at which it is not any more. Moment 0
            is before the step, moment n after its n-th operator.
        moments: their number.
        scratch: bytes that a kernel allocates and frees within the operator, by moment; on a CPU where that may be
            the peak.
        steps: on CUDA, operators whose scratch grows in steps, by moment.
    """

    sizes: tuple[int, ...]
    lifetimes: tuple[tuple[int, int], ...]
    moments: int
    scratch: dict[int, int] = field(default_factory=dict)
    steps: dict[int, ColumnSum | TiledBackward] = field(default_factory=dict)

    def alive(self) -> list[int]:
        """Bytes alive at each moment."""
        change = [0] * (self.moments + 1)
        for size, (born, died) in zip(self.sizes, self.lifetimes, strict=True):
            change[born] += size
            change[min(died, self.moments)] -= size
        return list(itertools.accumulate(change[:-1]))

    def peak(self) -> int:
        """The largest number of bytes alive, scratch included."""
        alive = self.alive()
        within = self.scratch | {moment: one.scratch() for moment, one in self.steps.items()}
        return max(*alive, *(alive[moment] + size for moment, size in within.items()))


class Recorder(Allocations):
    """Records the storages of a step, for a Timeline."""

    def __init__(self) -> None:
        super().__init__()
        self.moment = 0
        self._storages: list[list[int]] = []
        self._places: dict[int, int] = {}
        self._calls: list[tuple[int, Call]] = []

    def register_storage(self, tensor: Tensor) -> None:
        """As of Allocations, and remembers when."""
        storage = tensor.untyped_storage()
        new = storage._cdata not in self._known
        super().register_storage(tensor)
        if new:
            self._places[storage._cdata] = len(self._storages)
            self._storages.append([storage.nbytes(), self.moment, NEVER])

    def register_call(self, call: Call) -> None:
        """As of Allocations, and remembers when."""
        super().register_call(call)
        self._calls.append((self.moment, call))

    def _free(self, key: int, size: int) -> None:
        self._storages[self._places.pop(key)][2] = self.moment
        super()._free(key, size)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Moment 0 is over.
        self.moment = max(self.moment, 1)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self.moment += 1
        return out

    def timeline(self, device: str) -> Timeline:
        """What was recorded, with the scratch of that device's kernels; call it outside of any dispatch mode."""
        sizes = tuple(size for size, _, _ in self._storages)
        result = Timeline(sizes, tuple((born, died) for _, born, died in self._storages), self.moment)
        return self._with_cuda_scratch(result) if device == "cuda" else self._with_cpu_scratch(result)

    def _with_cuda_scratch(self, line: Timeline) -> Timeline:
        scratch, steps = {}, {}
        for moment, call in self._calls:
            if found := cuda_scratch.irregular(call):
                steps[moment] = found
            elif cuda_scratch.is_opaque(call.func):
                scratch[moment] = cuda_scratch.scratch(call)
        return replace(line, scratch=scratch, steps=steps)

    def _with_cpu_scratch(self, line: Timeline) -> Timeline:
        alive, within = line.alive(), {}
        peak = max(alive)
        for moment, call in self._calls:
            if cpu_scratch.is_opaque(call.func) and alive[moment] + cpu_scratch.bound(call) > peak:
                within[moment] = cpu_scratch.scratch(call)
        return replace(line, scratch=within)


def timelines(case: Case, alike: bool = False) -> Iterator[tuple[str, Timeline]]:
    """The timeline of each variant and mode, named by device, dtype and mode.

    Args:
        case: its device, dtype and mode are ignored.
        alike: whether the devices differ in fp32 in the scratch of kernels only, so that one run serves both.
    """
    for (device, dtype), mode in itertools.product(VARIANTS, MODES):
        if alike and (device, dtype) == ("cuda", "fp32"):
            continue
        recorder, one = Recorder(), replace(case, device=device, dtype=dtype, mode=mode)  # type: ignore[arg-type]
        predict(one.workload("meta"), device, recorder)
        yield f"{device} {dtype} {mode}", recorder.timeline(device)
        if alike and device == "cpu":
            yield f"cuda {dtype} {mode}", recorder.timeline("cuda")


def devices_alike(lines: Mapping[str, Timeline]) -> bool:
    """Whether fp32 has the same storages on both devices."""

    def storages(line: Timeline) -> Timeline:
        return replace(line, scratch={}, steps={})

    return all(storages(lines[f"cpu fp32 {mode}"]) == storages(lines[f"cuda fp32 {mode}"]) for mode in MODES)


def counted(case: Case) -> tuple[int, int]:
    """MACs of a training step: forward, backward."""
    forward, backward = macs.counted(case.workload("meta"))
    return forward, backward or 0
