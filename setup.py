"""Builds the CPU kernels (csrc/) into one library next to `dgemma.kernels`; all else is in pyproject.toml.

Without a compiler, or if it fails, the package installs without the library and says so when it would use it. The
library has a plain C face, so it needs neither Python's nor torch's headers.
"""

from __future__ import annotations

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FOLDER = Path("csrc")
COMMON = ["choose", "team", "matrix", "linear", "experts", "read", "rows", "vocabulary", "isa_portable"]
# Each instruction set's file and what compilers need to be told for it; the choice among them is made at run time.
X86 = {
    "avx2": (["-mavx2"], ["/arch:AVX2"]),
    "avxvnni": (["-mavx2", "-mavxvnni"], ["/arch:AVX2"]),
    "avx512vnni": (["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni"], ["/arch:AVX512"]),
}
ARM = {"neon": (["-march=armv8.2-a+dotprod"], [])}
PATHS = {"x86_64": X86, "amd64": X86, "aarch64": ARM, "arm64": ARM}
# No products fused with sums and no sums reordered: every instruction set gives the same bits.
UNIX_FLAGS = [
    "-std=c++17", "-O3", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-g0",
    "-Wno-maybe-uninitialized",  # gcc 12 about its own header
]  # fmt: skip
MSVC_FLAGS = ["/std:c++17", "/O2", "/fp:precise", "/EHsc"]


class BuildKernels(build_ext):
    """Compiles file by file: those of an instruction set with its flags, or not at all where a compiler lacks it."""

    def get_ext_filename(self, fullname: str) -> str:
        """One name on every Python: the library is not a Python module."""
        name = "dgemma_cpu.dll" if sys.platform == "win32" else "libdgemma_cpu.so"
        return os.path.join(*fullname.split(".")[:-1], name)

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """What is exported is marked in the source."""
        return []

    def build_extension(self, ext: Extension) -> None:
        """Compiles and links."""
        msvc = self.compiler.compiler_type == "msvc"
        paths = PATHS.get(platform.machine().lower(), {})
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            made = dict(zip(paths, pool.map(lambda item: self._path(*item, msvc), paths.items()), strict=True))
            macros = [(f"DGEMMA_HAS_{name.upper()}", "1") for name, object_file in made.items() if object_file]
            objects = list(pool.map(lambda name: self._compile(name, msvc, [], macros), COMMON))
        objects += [object_file for object_file in made.values() if object_file]
        threads = [] if msvc else ["-pthread"]
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), extra_postargs=threads, target_lang="c++"
        )

    def _path(self, name: str, flags: tuple[list[str], list[str]], msvc: bool) -> str | None:
        try:
            return self._compile(f"isa_{name}", msvc, flags[msvc], [])
        except Exception as error:  # compilers fail in ways of their own, and the others can do without this path
            self.warn(f"the CPU kernels are built without {name}: {error}")
            return None

    def _compile(self, name: str, msvc: bool, flags: list[str], macros: list[tuple[str, str]]) -> str:
        own = [*(MSVC_FLAGS if msvc else [*UNIX_FLAGS, "-fPIC"]), *flags]
        source = str(FOLDER / f"{name}.cpp")
        return self.compiler.compile([source], self.build_temp, macros, extra_postargs=own)[0]


setup(
    ext_modules=[
        Extension(
            "dgemma.kernels.cpu_library",
            sources=[str(path) for path in sorted(FOLDER.glob("*.cpp"))],
            depends=[str(path) for path in sorted(FOLDER.glob("*.h"))],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
