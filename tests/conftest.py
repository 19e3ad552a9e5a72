"""Fixtures for every test: a fixed seed, and uninitialised memory filled with NaN."""

import os
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

# Before PyTorch is loaded. Threads that spin while they wait make small tests ten times slower on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hypothesis
import jaxtyping
import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn

# make test and make test-all (full) try the same examples each time, so that a red run is about a change.
# HYPOTHESIS_PROFILE=search looks for new ones.
for profile, examples in (("quick", 25), ("full", 200), ("search", 1000)):
    hypothesis.settings.register_profile(profile, max_examples=examples, deadline=None, derandomize=profile != "search")
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

# Before Triton is loaded: without a GPU its kernels are interpreted. Code compiled for a CPU does not use Triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Tests compare with fp64, and not always under the settings of a workload.
torch.backends.cudnn.allow_tf32 = False

# A torch.device context caches the tensor constructors at its first use: enter one before they are replaced below.
with torch.device("cpu"):
    torch.empty(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--plugin", action="append", default=[], metavar="FILE", help="a file with attentions to be tested"
    )


def interpreter_problem() -> str | None:
    """Why the installed Triton cannot interpret kernels; None if it can or need not."""
    try:
        triton, numpy = version("triton"), version("numpy")
    except PackageNotFoundError:  # Not installed, or a nightly build, which has another name and is newer.
        return None
    if os.environ.get("TRITON_INTERPRET") != "1":
        return None
    if Version(triton) >= Version("3.7") or Version(numpy) < Version("2.4"):
        return None
    return f"Triton {triton} interprets kernels with NumPy < 2.4 only, and this is {numpy}: pip install 'numpy<2.4'"


# Last: the runtime checks of shapes are installed before anything of the zoo is imported.
@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    if problem := interpreter_problem():
        raise pytest.UsageError(problem)
    if plugins := config.getoption("--plugin"):
        from attention_zoo import InvalidOption, load_plugin

        try:
            for plugin in plugins:
                load_plugin(plugin)
        except InvalidOption as problem:
            raise pytest.UsageError(str(problem)) from problem


MARKED_FIXTURES = {
    "smoke": "slow", "cluster": "slurm", "shown": "notebooks", "answered": "slow", "tensorboard": "slow",
    "report_page": "slow",
}  # fmt: skip
"""Slow fixtures, and the mark of the tests that use them. ``make test`` leaves them out."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for fixture in set(MARKED_FIXTURES) & set(getattr(item, "fixturenames", ())):
            item.add_marker(MARKED_FIXTURES[fixture])


def made(name: str, impl: str = "reference", *, dim: int, heads: int, **chosen: Any) -> nn.Module:
    """In fp64 and eval, with weights large enough that the softmax is far from uniform; the same for each impl."""
    from attention_zoo import build

    module = build(name, dim=dim, num_heads=heads, impl=impl, **chosen).eval().double()
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def image(height: int, width: int, batch: int = 2, *, dim: int) -> Tensor:
    """A standard normal grid in fp64, the same each time."""
    torch.manual_seed(2)
    return torch.randn(batch, height, width, dim, dtype=torch.float64)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def registry_as_found(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Unregister the attentions that a test registers."""
    from attention_zoo.core import registry

    before = set(sys.modules)
    monkeypatch.setattr(registry, "_CLASSES", dict(registry._CLASSES))
    yield
    for name in set(sys.modules) - before:
        if name.startswith("attention plugin"):
            del sys.modules[name]


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Disable the checks: a wrong value reaches the code that rejects it, and a tracer may pass sizes as tensors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill uninitialised floating-point tensors with NaN, so that reading them is detected."""
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (Tensor, "new_empty"),
        (Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, _poison(getattr(owner, name)))


def _poison(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def poisoned(*args: object, **kwargs: object) -> Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point() and not tensor.is_meta:
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    return poisoned


@pytest.fixture(scope="session")
def compiler() -> None:
    """For tests that compile: skipped where no compiler is installed, or this CPU has no FlexAttention."""
    from attention_zoo.core import compilers
    from attention_zoo.ops import flex_backend

    if reason := flex_backend.unsupported(torch.zeros(1), 16, gradients=False) or compilers.pytorch_lacks("cuda"):
        pytest.skip(reason)


@pytest.fixture(scope="session", autouse=True)
def own_prediction_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No prediction that this user has kept is read, and none is left."""
    from ablations.analysis import prediction_cache

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prediction_cache, "FOLDER", tmp_path_factory.mktemp("predictions"))
        yield
