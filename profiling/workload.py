"""One step of work on a module: what every meter runs."""

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from attention_zoo import Unsupported

Mode = Literal["forward", "forward_backward"]
Dtype = Literal["fp64", "fp32", "tf32", "bf16", "fp16"]
WARM_UP = 3
"""Steps before one is recorded: kernels are chosen and compiled, and workspaces allocated, in the first ones."""
AUTOCAST: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Workload:
    """A module, its input, and the step to be counted, predicted, checked and timed.

    A ``forward`` step runs without gradients. A ``forward_backward`` step starts without gradients on
    the parameters, runs the module, and sends a given gradient back to the input and every parameter.

    Args:
        module: any module from one tensor to one tensor.
        x: its input.
        mode: which step.
        dtype: fp64 and fp32 run as they are; tf32 lets fp32 products and convolutions round their inputs; bf16 and
            fp16 run under autocast, parameters staying fp32.
        deterministic: refuse or replace kernels whose result may change from run to run.
        grad: the gradient of the output, for forward_backward; random numbers if not given.
        input_gradient: whether forward_backward computes the input's gradient too, as inside a network.
    """

    def __init__(
        self,
        module: nn.Module,
        x: Tensor,
        mode: Mode = "forward",
        dtype: Dtype = "fp32",
        deterministic: bool = False,
        grad: Tensor | None = None,
        input_gradient: bool = True,
    ) -> None:
        self.module, self.mode, self.dtype, self.deterministic = module, mode, dtype, deterministic
        self.input_gradient = input_gradient and mode == "forward_backward" and x.is_floating_point()
        self.x = x.detach().requires_grad_(self.input_gradient)
        self.grad = grad
        self._recorded: tuple[torch.cuda.CUDAGraph, Tensor] | None = None
        if mode == "forward_backward" and grad is None:
            with self.settings(), torch.no_grad():
                # Contiguous whatever the output's layout is, which may differ on meta.
                self.grad = torch.randn_like(module(self.x), memory_format=torch.contiguous_format)

    def step(self) -> Tensor:
        """Run once. The caller holds :meth:`settings` around any number of steps."""
        if self._recorded is not None:
            graph, out = self._recorded
            graph.replay()
            return out
        if self.mode == "forward":
            with torch.no_grad():
                return self.module(self.x)
        self.x.grad = None
        for parameter in self.module.parameters():
            parameter.grad = None
        out = self.module(self.x)
        out.backward(self.grad)
        return out

    def compile(self) -> None:
        """Put the module under torch.compile, in place; it compiles at its first step."""
        import torch._dynamo.config
        import torch._inductor.config

        # Workers for compilation would outlive the cell and be reported as leaked.
        torch._inductor.config.compile_threads = 1
        with suppress(ImportError):
            from tqdm import tqdm

            # So would the semaphore that the compiler's progress bars take for a lock.
            tqdm.set_lock(threading.RLock())
        # What an earlier process compiled would be taken for a fast compilation.
        torch._inductor.config.force_disable_caches = True
        warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")
        if hasattr(torch._dynamo.config, "trace_autograd_ops"):
            # A backward pass of one's own may differentiate what it recomputes.
            torch._dynamo.config.trace_autograd_ops = True
        self.module.compile(dynamic=False, fullgraph=True)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Meanwhile every step is a replay of one that was recorded in a CUDA graph, forward and backward.

        Input, output, their gradients and those of the parameters stay where they were when it was recorded.

        Raises:
            Unsupported: the workload is not on a CUDA device.
        """
        check_graphs(self.x.device.type)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = self.step()
        self._recorded = graph, out
        try:
            yield
        finally:
            self._recorded = None

    @contextmanager
    def settings(self) -> Iterator[None]:
        """The numerical settings of this workload, restored on exit."""
        precision, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        deterministic = torch.are_deterministic_algorithms_enabled()
        with ExitStack() as stack:
            stack.callback(torch.set_float32_matmul_precision, precision)
            stack.callback(setattr, torch.backends.cudnn, "allow_tf32", convolutions)
            stack.callback(torch.use_deterministic_algorithms, deterministic)
            torch.set_float32_matmul_precision("high" if self.dtype == "tf32" else "highest")
            torch.backends.cudnn.allow_tf32 = self.dtype == "tf32"
            torch.use_deterministic_algorithms(self.deterministic)
            if self.dtype in AUTOCAST and not self.x.is_meta:
                # The cache would keep casts of the weights alive between steps.
                stack.enter_context(torch.autocast(self.x.device.type, dtype=AUTOCAST[self.dtype], cache_enabled=False))
            yield

    def base_bytes(self) -> int:
        """Bytes that are there before the step: parameters, buffers, input and output gradient, each storage once."""
        return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in self.tensors()}.values())

    def tensors(self) -> list[Tensor]:
        """All that is there before the step."""
        grad = [] if self.grad is None else [self.grad]
        return [*self.module.parameters(), *self.module.buffers(), self.x, *grad]


def check_graphs(device: str) -> None:
    """Unsupported unless steps on ``device`` can be recorded in a CUDA graph."""
    if device != "cuda":
        raise Unsupported(f"cuda_graph=True: a CUDA graph records work of a CUDA device, not of {device}")


@contextmanager
def imitated(work: Workload, make: Callable[[Tensor], Tensor]) -> Iterator[Workload]:
    """The same workload with every tensor (parameter, buffer, input, output gradient) replaced by ``make(tensor)``.

    The module itself is lent, not copied: it has its own tensors back on exit.
    """
    made: dict[int, Tensor] = {}

    def imitate(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = make(tensor).requires_grad_(tensor.requires_grad)
        return made[id(tensor)]

    module = work.module
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    state = {name: imitate(tensor) for name, tensor in named}
    grad = None if work.grad is None else imitate(work.grad)
    with _reparametrize_module(module, state):
        yield Workload(module, make(work.x), work.mode, work.dtype, grad=grad, input_gradient=work.input_gradient)
