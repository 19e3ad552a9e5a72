"""Without a compiler, Python's headers or a folder for the result, what must be compiled is refused with a reason."""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from attention_zoo import Unsupported, build
from attention_zoo.core import compilers
from attention_zoo.ops import flex_backend
from profiling.cases.case import Case
from profiling.execution.benchmark import Job, prepare

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test before has found is asked for again, and PyTorch lies where it can compile."""
    for asked in ("_no_compiler", "_no_room"):
        monkeypatch.setattr(compilers, asked, getattr(compilers, asked).__wrapped__)
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(torch, "__file__", "/torch/__init__.py")


def test_nothing_is_missing_with_compilers_and_headers(compiler: None) -> None:
    assert compilers.pytorch_lacks("cpu") is None and compilers.pytorch_lacks("cuda") is None


@pytest.mark.parametrize(("device", "kind", "package"), [("cpu", r"C\+\+", r"g\+\+"), ("cuda", "C", "gcc")])
def test_no_compiler(device: str, kind: str, package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert re.search(f"needs a {kind} compiler .*none; .*apt install {package} ", str(compilers.pytorch_lacks(device)))


def test_a_compiled_cell_without_a_compiler_is_unsupported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unsupported, match=r"compiled=True: .* needs a C\+\+ compiler .*none; "):
        prepare(Job(Case("bra", 8, 8, dim=16, compiled=True)))


@pytest.mark.parametrize(("variable", "device"), [("CXX", "cpu"), ("CC", "cuda")])
def test_a_compiler_that_is_not_there(variable: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "no-such-compiler")
    assert f" and {variable}=no-such-compiler: " in str(compilers.pytorch_lacks(device))


@pytest.mark.parametrize("mark", [" ", "'"])
def test_a_path_that_pytorch_cannot_pass_to_a_compiler(
    compiler: None, mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__file__", f"/a{mark}b/torch/__init__.py")
    assert f"from a path with {mark!r}: /a{mark}b/torch" in str(compilers.pytorch_lacks("cpu"))
    assert compilers.pytorch_lacks("cuda") is None


def test_flex_needs_vector_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex_backend, "VECTORS", "NEON")
    with torch.no_grad(), pytest.raises(Unsupported, match=r"FlexAttention needs a CPU with AVX2, .* uses NEON here"):
        build("neighborhood", dim=64, num_heads=2, impl="flex")(torch.zeros(1, 8, 8, 64))


def test_no_headers(compiler: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path))
    for device in ("cpu", "cuda"):
        assert "does not find Python.h; on Debian and Ubuntu: apt install g" in str(compilers.pytorch_lacks(device))
    x = torch.zeros(1, 8, 8, 64)
    for name in ("bra", "neighborhood"):
        options = {"n_win": 2, "topk": 1} if name == "bra" else {}
        flex, auto = (build(name, dim=64, num_heads=2, impl=impl, **options) for impl in ("flex", "auto"))
        with torch.no_grad():
            assert auto(x).shape == x.shape and auto.chosen_impl(x) == "sdpa"
            with pytest.raises(Unsupported, match=r"impl='flex': .*does not find Python\.h"):
                flex(x)


def test_headers_that_the_environment_names(compiler: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CPATH", sysconfig.get_path("include", "posix_prefix"))
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path))
    assert compilers.pytorch_lacks("cpu") is None and compilers.pytorch_lacks("cuda") is None


LACKS = {"TRITON_CACHE_DIR": compilers.triton_lacks, "TORCHINDUCTOR_CACHE_DIR": lambda: compilers.pytorch_lacks("cpu")}


@pytest.fixture(params=sorted(LACKS))
def variable(request: pytest.FixtureRequest) -> str:
    if request.param == "TRITON_CACHE_DIR":
        pytest.importorskip("triton")
    return str(request.param)


def test_a_folder_that_cannot_be_written(
    compiler: None, variable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As in a container that runs as its host's user, whose home is the root folder."""
    folder = tmp_path / "file" / "cache"
    folder.parent.touch()
    monkeypatch.setenv(variable, str(folder))
    assert re.search(f"into {folder}: .*; set {variable} to a ", str(LACKS[variable]()))
    folder.parent.unlink()
    assert LACKS[variable]() is None and not list(folder.iterdir())


@pytest.mark.skipif(not hasattr(os, "ST_NOEXEC"), reason="this system does not say how a folder is mounted")
def test_a_folder_that_code_cannot_run_from(
    compiler: None, variable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As a container's /tmp, if Docker mounts it as a tmpfs."""
    monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setattr(os, "statvfs", lambda folder: SimpleNamespace(f_flag=os.ST_NOEXEC | os.ST_NOSUID))
    assert f"into {tmp_path}, which is mounted noexec; set {variable} to a " in str(LACKS[variable]())


class OnGPU(torch.Tensor):
    """Says that it is on a GPU, where there is none."""

    is_cuda = True


@pytest.mark.parametrize("variable", ["CC", "TRITON_CACHE_DIR"])
def test_on_a_gpu_triton_needs_both(
    compiler: None, variable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=9))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    x, bra = torch.zeros(1).as_subclass(OnGPU), build("bra", dim=64, num_heads=2)
    assert bra.unsupported("triton", x) is None
    monkeypatch.setenv(variable, "/dev/null/none")
    assert "/dev/null/none: " in str(bra.unsupported("triton", x))


AGREES = """
import torch
from attention_zoo import build
options = dict(dim=16, num_heads=4, kernel_size=3)
reference, fast = (build("neighborhood", impl=impl, **options) for impl in ("reference", "flex"))
fast.load_state_dict(reference.state_dict())
with torch.no_grad():
    x = torch.randn(2, 8, 8, 16)
    torch.testing.assert_close(fast(x), reference(x), rtol=1e-4, atol=1e-5)
"""


@pytest.mark.slow
@pytest.mark.skipif(flex_backend.VECTORS != "AVX512", reason="it compiles for AVX-512")
def test_a_cpu_does_not_run_what_is_compiled_for_another(compiler: None, tmp_path: Path) -> None:
    """Two kinds of CPU that share PyTorch's cache, as nodes of a cluster may."""
    for vectors in ("avx512", "avx2"):
        here = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "ATEN_CPU_CAPABILITY": vectors}
        done = subprocess.run([sys.executable, "-c", AGREES], env=here, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
