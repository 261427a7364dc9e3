"""Builds the paper card: a CUDA runtime that computes nothing, for torch's CUDA build on a machine without a card (Linux x86-64).

    python -m tests.papercard.build FOLDER

The two libraries that it writes go before the real ones: LD_PRELOAD=FOLDER/libpapercard.so LD_LIBRARY_PATH=FOLDER. Everything on
the host's side is then real: torch's caching allocator, autocast, the choice of attention kernels, the gradient scaler, fused
optimizers, out-of-memory errors. Values are zeros or leftovers: only memory, shapes, types and control flow mean anything. The
headers come with torch (nvidia-cuda-runtime, triton); gcc and nm are needed.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
TORCH_LIBRARIES = ("libc10_cuda.so", "libtorch_cuda.so", "libtorch_cuda_linalg.so", "libtorch_python.so")
IMPORTED = re.compile(r"(__)?cuda[A-Z]\w*|cublas\w+")
DEFINED = re.compile(r"^[\w\* ]+?\**((?:__)?cuda\w+|cublas\w+)\(", re.MULTILINE)


def build(folder: Path) -> None:
    """Write libpapercard.so and libcuda.so.1 into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    source = (HERE / "runtime.c").read_text(encoding="utf-8")
    missing = sorted(set(imported()) - set(DEFINED.findall(source)))
    generated = folder / "generated.c"
    generated.write_text(source + "".join(f"int {name}(void) {{ return 0; }}\n" for name in missing), encoding="utf-8")
    compile_c(generated, folder / "libpapercard.so", *(f"-I{folder}" for folder in headers()))
    compile_c(HERE / "driver.c", folder / "libcuda.so.1", "-ldl")


def compile_c(source: Path, library: Path, *options: str) -> None:
    """Compile a shared library."""
    command = ["gcc", "-shared", "-fPIC", "-O1", "-w", "-o", str(library), str(source), *options]
    subprocess.run(command, check=True)


def site(package: str) -> Path:
    """Return the folder of an installed package."""
    found = importlib.util.find_spec(package)
    assert found is not None, f"{package} is not installed"
    assert found.submodule_search_locations
    return Path(next(iter(found.submodule_search_locations)))


def headers() -> list[Path]:
    """Return the folders of CUDA's headers: those of the runtime that torch uses, and what they include, which Triton has."""
    runtime = next(path.parent for path in sorted(site("nvidia").rglob("driver_types.h")))
    return [runtime, site("triton") / "backends" / "nvidia" / "include"]


def imported() -> Iterator[str]:
    """Yield the names that torch and bitsandbytes import from the CUDA runtime and cuBLAS."""
    libraries = [site("torch") / "lib" / name for name in TORCH_LIBRARIES]
    libraries += site("bitsandbytes").glob("libbitsandbytes_cuda13*.so")
    for library in filter(Path.is_file, libraries):
        command = ["nm", "-D", "--undefined-only", str(library)]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        names = (line.split()[-1].partition("@")[0] for line in lines)
        yield from filter(IMPORTED.fullmatch, names)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
