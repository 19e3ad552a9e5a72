"""Memory of one step: predicted without a device, and measured on one.

Predicted and measured bytes are those requested, including the base (parameters, buffers, input, output gradient). An
allocator rounds requests up and reserves more, and libraries keep workspaces; on CUDA reserved bytes include this.
"""

import gc
import weakref
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from attention_zoo.core.memory_simulation import simulated_device
from profiling.cases.workload import AUTOCAST, Workload, with_fake_tensors
from profiling.meters import cpu_scratch, cuda_scratch
from profiling.meters.cpu_scratch import memory_events, peak_of
from profiling.meters.operator_call import Call

SCRATCH: dict[str, Any] = {"cpu": cpu_scratch, "cuda": cuda_scratch}
"""What is known of scratch within operators, by device."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one step: before it, at its peak, and reserved by the allocator (CUDA only)."""

    base: int
    peak: int
    reserved: int | None = None


class Allocations(TorchDispatchMode):
    """Tracks every storage that an operator creates, until its last reference."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.linear = RunningLinear()
        self._known: dict[int, weakref.finalize] = {}
        self._opaque: dict[Call, int] = {}

    def register_storage(self, tensor: Tensor) -> None:
        """Track a storage that existed before or was just created."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self.live += size
        self._known[key] = weakref.finalize(storage, self._free, key, size)

    def register_call(self, call: Call) -> None:
        """Remember a call whose kernel has scratch on some device, at the most bytes that were alive after it."""
        self._opaque[call] = max(self._opaque.get(call, 0), self.live)

    def _free(self, key: int, size: int) -> None:
        self.live -= size
        del self._known[key]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in IN_PLACE_IN_BACKWARD and torch._C._current_graph_task_id() >= 0:
            func = IN_PLACE_IN_BACKWARD[func]
        if func is _aten.add.Tensor and self.linear.running:
            out = _aten.alias.default(_aten.add_.Tensor(*args))
        else:
            out = func(*args, **(kwargs or {}))
        if func is _aten.view.default:
            out = _as_viewed_natively(args[0], out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.register_storage(leaf)
        self.peak = max(self.peak, self.live)
        if any(kernels.is_opaque(func) for kernels in SCRATCH.values()):
            self.register_call(Call.of(func, args, kwargs or {}))
        return out

    def peak_with_scratch(self, device: str) -> int:
        """The peak including the scratch of that device's kernels; call it outside of any dispatch mode."""
        peak, kernels = self.peak, SCRATCH[device]
        for call, live in sorted(self._opaque.items(), key=lambda item: -item[1]):
            if kernels.is_opaque(call.func) and live + kernels.bound(call) > peak:
                peak = max(peak, live + kernels.scratch(call))
        return peak


class RunningLinear(TorchFunctionMode):
    """Whether a linear layer is running.

    If its input is not contiguous, it adds the bias in place, but under a dispatch mode into a copy.
    """

    running = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.running = func is torch.nn.functional.linear
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.running = False


def _as_viewed_natively(x: Tensor, view: Tensor) -> Tensor:
    """A view of ``x`` with the strides of a real tensor's: those of an axis of size 1 differ on fake tensors.

    They matter where a convolution asks whether its channels are last.
    """
    if not isinstance(view, FakeTensor) or 1 not in (*x.shape, *view.shape):
        return view
    with _disable_current_modes():
        strides = torch.empty_strided(x.shape, x.stride(), device="meta").view(view.shape).stride()
    return view if strides == view.stride() else x.as_strided(view.shape, strides)


_aten = torch.ops.aten
IN_PLACE_IN_BACKWARD = {
    _aten.scatter_add.default: _aten.scatter_add_.default,
    _aten.scatter.src: _aten.scatter_.src,
    _aten.scatter.value: _aten.scatter_.value,
    _aten.index_put.default: _aten.index_put_.default,
    _aten.index_add.default: _aten.index_add_.default,
}
"""PyTorch's derivative formulas write into new zeros in place, but copy under a dispatch mode such as Allocations."""


def predictable(work: Workload, device: str) -> bool:
    """Whether a prediction would be exact: no rule covers the internal copies of half-precision CPU kernels."""
    return device != "cpu" or work.dtype not in (*AUTOCAST, "bf16_params")


def predict(work: Workload, device: str = "cpu", tracker: Allocations | None = None) -> Memory:
    """Peak bytes of one step of ``work`` on ``device``, without running a kernel or using the device.

    The module may be on any device, ``meta`` included; it is not copied. Every operator runs on shapes only, and its
    storages are tracked through forward and backward, so the cost is independent of the resolution. A ``tracker`` of
    the caller's may observe more than the peak.
    """
    kind = device.partition(":")[0]
    tracker = Allocations() if tracker is None else tracker
    with FakeTensorMode(), with_fake_tensors(work, _fake) as imitation:
        if imitation.grad is not None and work.dtype in AUTOCAST:
            # A meta workload runs without autocast, so its output gradient lacks the dtype of autocast.
            with simulated_device(kind), imitation.settings(), _casts(work, kind), torch.no_grad():
                imitation.grad = torch.empty_like(imitation.module(imitation.x))
        for tensor in imitation.tensors():
            tracker.register_storage(tensor)
        tracker.peak = base = tracker.live
        with simulated_device(kind), imitation.settings(), _casts(work, kind), tracker.linear, tracker:
            imitation.step()
    return Memory(base, tracker.peak_with_scratch(kind))


class CudaCasts(TorchFunctionMode):
    """Emulates CUDA autocast on CPU tensors; CPU autocast leaves these functions in half precision."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in CAST_TO_FP32:
            args, kwargs = tree_map_only(Tensor, _to_fp32, (args, kwargs))
        return func(*args, **kwargs)


CAST_TO_FP32 = frozenset({
    torch.softmax, torch.Tensor.softmax, torch.nn.functional.softmax, torch.nn.functional.layer_norm, torch.layer_norm,
    torch.nn.functional.group_norm, torch.nn.functional.normalize, torch.norm, torch.Tensor.norm, torch.sum,
    torch.Tensor.sum, torch.cumsum, torch.Tensor.cumsum, torch.exp, torch.Tensor.exp, torch.log, torch.Tensor.log,
    torch.pow, torch.Tensor.pow, torch.Tensor.__pow__, torch.rsqrt, torch.Tensor.rsqrt,
})  # fmt: skip
"""https://docs.pytorch.org/docs/stable/amp.html, CUDA ops that autocast to float32; only those attentions call."""


def _to_fp32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in AUTOCAST.values() else tensor


def _casts(work: Workload, device: str) -> AbstractContextManager[object]:
    return CudaCasts() if device == "cuda" and work.dtype in AUTOCAST else nullcontext()


def measure(work: Workload, warm: bool = False) -> Memory:
    """Peak bytes of one step of ``work`` on its own device, after a first step unless ``warm``.

    The first step on a device makes lasting allocations, such as library workspaces.
    """
    with work.settings():
        if not warm:
            work.step()
        gc.collect()
        return (_measure_cuda if work.x.is_cuda else _measure_cpu)(work)


def _measure_cpu(work: Workload) -> Memory:
    base = work.base_bytes()
    _forget_gradients(work)
    return Memory(base, base + peak_of(memory_events(work.step)))


def _measure_cuda(work: Workload) -> Memory:
    device = work.x.device
    _forget_gradients(work)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before, base = torch.cuda.memory_stats(device)["requested_bytes.all.current"], work.base_bytes()
    work.step()
    torch.cuda.synchronize(device)
    peak = torch.cuda.memory_stats(device)["requested_bytes.all.peak"]
    return Memory(base, base + peak - before, torch.cuda.max_memory_reserved(device))


def _forget_gradients(work: Workload) -> None:
    work.x.grad = None
    work.module.zero_grad(set_to_none=True)


def _fake(tensor: Tensor) -> Tensor:
    # On "cpu" for every device: a fake CUDA tensor needs a PyTorch built with CUDA.
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
