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


def missing(device: str) -> str | None:
    """What PyTorch and Triton lack here to compile a kernel for ``device``; None if nothing.

    For a CPU, PyTorch writes C++. For a GPU, Triton writes the part of a kernel that launches it in C. Both include
    Python.h, which the Python of Debian and Ubuntu has in a package of its own.
    """
    # A compiler that traces this was found before, and cannot trace how.
    return None if torch.compiler.is_compiling() else _missing("c++" if device == "cpu" else "c")


@cache
def _missing(language: str) -> str | None:
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


def no_room_for_triton() -> str | None:
    """Why Triton cannot keep the kernels that it compiles; None if it can. It runs them from files only."""
    return None if torch.compiler.is_compiling() else _no_room_for_triton()


@cache
def _no_room_for_triton() -> str | None:
    from triton import knobs

    folder = knobs.cache.dir
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as problem:
        mend = "set TRITON_CACHE_DIR to a folder that can be written"
        return f"its kernels are compiled here, into {folder}: {problem.strerror}; {mend}"
    return None


def _found(language: str) -> str | None:
    """The compiler that PyTorch (C++) or Triton (C) takes unless CXX or CC names one."""
    if language == "c":
        return shutil.which("gcc") or shutil.which("clang")
    return shutil.which("clang++" if sys.platform == "darwin" else "g++")
