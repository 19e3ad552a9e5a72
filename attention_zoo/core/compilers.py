"""What PyTorch and Triton need to compile a kernel: a C or C++ compiler, and a folder for the result."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from functools import cache

import torch

INSTALL = {"c": "apt install gcc python3-dev", "c++": "apt install g++ python3-dev"}


def pytorch_lacks(device: str) -> str | None:
    """Why PyTorch cannot compile a kernel for ``device`` here; None if it can.

    For a CPU, PyTorch writes C++. For a GPU, Triton writes the part of a kernel that launches it in C. Both include
    Python.h, which the Python of Debian and Ubuntu has in a package of its own.
    """
    if torch.compiler.is_compiling():
        # What traces this was found before, and cannot trace how.
        return None
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or tempfile.gettempdir()
    return _no_compiler("c++" if device == "cpu" else "c") or _no_room(folder, "TORCHINDUCTOR_CACHE_DIR")


def triton_lacks() -> str | None:
    """Why Triton cannot compile our kernels for a GPU here; None if it can."""
    if torch.compiler.is_compiling():
        return None
    from triton import knobs

    return _no_compiler("c") or _no_room(knobs.cache.dir, "TRITON_CACHE_DIR")


@cache
def _no_compiler(language: str) -> str | None:
    if language == "c++" and (unsafe := set(" '\"") & set(torch.__file__)):
        written = " and ".join(sorted(map(repr, unsafe)))
        return f"it is compiled here, and PyTorch compiles for no CPU from a path with {written}: {torch.__file__}"
    variable, kind = ("CXX", "C++") if language == "c++" else ("CC", "C")
    compiler = os.environ.get(variable) or _found(language)
    needs = f"it is compiled here, which needs a {kind} compiler with Python's headers"
    mend = f"on Debian and Ubuntu: {INSTALL[language]}"
    if compiler is None:
        return f"{needs}, and there is none; {mend}"
    headers = sysconfig.get_path("include", "posix_prefix")
    command = [compiler, "-E", "-x", language, f"-I{headers}", "-"]
    try:
        result = subprocess.run(command, input=b"#include <Python.h>\n", capture_output=True, check=False)
    except OSError as problem:
        return f"{needs}, and {variable}={compiler}: {problem.strerror}; {mend}"
    return f"{needs}, and {compiler} does not find Python.h; {mend}" if result.returncode else None


@cache
def _no_room(folder: str, variable: str) -> str | None:
    """Why ``folder`` cannot hold compiled code, which runs from files only; ``variable`` names another folder."""
    mend = f"set {variable} to a folder that can be written and is not mounted noexec"
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as problem:
        return f"it is compiled here, into {folder}: {problem.strerror}; {mend}"
    # As Docker mounts a tmpfs, and many clusters /tmp.
    if os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0):
        return f"it is compiled here, into {folder}, which is mounted noexec; {mend}"
    return None


def _found(language: str) -> str | None:
    """The compiler that PyTorch (C++) or Triton (C) takes unless CXX or CC names one."""
    if language == "c":
        return shutil.which("gcc") or shutil.which("clang")
    return shutil.which("clang++" if sys.platform == "darwin" else "g++")
