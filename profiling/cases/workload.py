"""One step of a module, run by every meter."""

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from attention_zoo import Unsupported
from attention_zoo.core import compilers

Mode = Literal["forward", "forward_backward"]
Dtype = Literal["fp64", "fp32", "tf32", "bf16", "fp16", "bf16_params"]
WARM_UP = 3
"""Steps before recording; the first steps select and compile kernels and allocate workspaces."""
AUTOCAST: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
PARAMETERS: dict[str, torch.dtype] = {"fp64": torch.float64, "bf16_params": torch.bfloat16}
"""The type of parameters and input; of all others fp32."""


class Workload:
    """A module, its input, and the step to be counted, predicted, checked and timed.

    A ``forward`` step runs without gradients. A ``forward_backward`` step clears the gradients, runs the module and
    backpropagates a given output gradient to the input and every parameter.

    Args:
        module: any module from one tensor to one tensor.
        x: its input.
        mode: which step.
        dtype: fp64, fp32 and bf16_params run unchanged, with parameters and input of that type; tf32 lets fp32
            products and convolutions round their inputs; bf16 and fp16 run under autocast with fp32 parameters.
        deterministic: replace or reject kernels with nondeterministic results.
        grad: the output gradient for forward_backward; random if not given.
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
                # Always contiguous: the output's layout may differ on meta.
                self.grad = torch.randn_like(module(self.x), memory_format=torch.contiguous_format)

    def step(self) -> Tensor:
        """Run one step. The caller enters :meth:`settings` around one or more steps."""
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
        """Apply torch.compile to the module in place; the first step compiles it."""
        import torch._dynamo.config

        compile_in_process()
        # Cached code of an earlier process would shorten the compile time.
        torch._inductor.config.force_disable_caches = True
        warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")
        if hasattr(torch._dynamo.config, "trace_autograd_ops"):
            # A custom backward pass may differentiate what it recomputes.
            torch._dynamo.config.trace_autograd_ops = True
        self.module.compile(dynamic=False, fullgraph=True)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Within the context, every step replays one recorded step, forward and backward, from a CUDA graph.

        Input, output and all gradients keep the addresses of the recorded step.

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
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph):
                # Detached, so that no autograd state refers to the capture stream in later steps.
                out = self.step().detach()
        except BaseException:
            # A failed capture may leave its own stream as the current one.
            torch.cuda.set_stream(stream)
            raise
        self._recorded = graph, out
        try:
            yield
        finally:
            self._recorded = None

    @contextmanager
    def settings(self) -> Iterator[None]:
        """Apply the numerical settings of this workload; restored on exit."""
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
                # Autocast's cache would keep cast weights alive between steps.
                stack.enter_context(torch.autocast(self.x.device.type, dtype=AUTOCAST[self.dtype], cache_enabled=False))
            yield

    def base_bytes(self) -> int:
        """Bytes held before the step: parameters, buffers, input and output gradient; each storage counts once."""
        return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in self.tensors()}.values())

    def tensors(self) -> list[Tensor]:
        """All tensors held before the step."""
        grad = [] if self.grad is None else [self.grad]
        return [*self.module.parameters(), *self.module.buffers(), self.x, *grad]


def compile_in_process() -> None:
    """Make all later compilation, FlexAttention's included, run in this process only."""
    import torch._inductor.config

    # Compile workers would outlive the cell, be reported as leaked, and start 16 processes for one kernel.
    torch._inductor.config.compile_threads = 1
    with suppress(ImportError):
        from tqdm import tqdm

        # The lock of the compiler's progress bars is a semaphore that would leak too.
        tqdm.set_lock(threading.RLock())


def check_compiler(device: str) -> None:
    """Raise Unsupported unless torch.compile can compile for ``device`` here."""
    if reason := compilers.pytorch_lacks(device):
        raise Unsupported(f"compiled=True: {reason}")


def check_graphs(device: str) -> None:
    """Raise Unsupported unless ``device`` can record steps in a CUDA graph."""
    if device != "cuda":
        raise Unsupported(f"cuda_graph=True: a CUDA graph records work of a CUDA device, not of {device}")


@contextmanager
def with_fake_tensors(work: Workload, make: Callable[[Tensor], Tensor]) -> Iterator[Workload]:
    """The same workload with every tensor (parameter, buffer, input, output gradient) replaced by ``make(tensor)``.

    The module is not copied; its own tensors are restored on exit.
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
