"""Compiles the kernels for CPU where they can be used. All else about the package is in pyproject.toml.

With the kernels, bfloat16 on x86 CPUs is 1.4 to 2.6 times as fast as by XLA; all else works
without them. To compile them takes 20 seconds, a C++20 compiler, and the headers in jaxlib, a download of
85 MB where jaxlib is not installed yet. So they are left out where nobody would use them: on other systems
than x86-64 Linux, and on machines with TPUs. The environment variable QWEN2_CPU_KERNELS=0 leaves them out
anywhere.
"""

import importlib.util
import os
import platform
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

NAME = "qwen2_core.kernels.cpu._kernels"
SOURCES = "qwen2_core/kernels/cpu/csrc"
# The oldest, as XLA's FFI lets later ones run what is compiled with its headers, not the other way round.
JAXLIB = "jaxlib>=0.10.2,<0.11"
MISSED = "without the kernels for CPU, bfloat16 on a CPU takes 1.4 to 2.6 times as long"
# The PCI devices that JAX takes for TPUs, v3 to 7x (jax/_src/hardware_utils.py).
TPU_VENDOR = "0x1ae0"
TPU_DEVICES = {"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}


def reason_to_skip(pci: Path = Path("/sys/bus/pci/devices")) -> str:
    """Returns why the kernels are not compiled here; empty where they are."""
    if os.environ.get("QWEN2_CPU_KERNELS") == "0":
        return "QWEN2_CPU_KERNELS is 0"
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "they are for x86-64 Linux"
    ids = ((one / "vendor", one / "device") for one in pci.glob("*"))
    if any(v.read_text().strip() == TPU_VENDOR and d.read_text().strip() in TPU_DEVICES for v, d in ids):
        return "this machine has TPUs"
    compiler = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    if not shutil.which(compiler.split()[0]):
        return f"there is no C++ compiler {compiler.split()[0]}"
    return ""


def jaxlib_headers() -> Path | None:
    """Returns the headers of jaxlib, of the build's or of the environment for which pip builds."""
    if spec := importlib.util.find_spec("jaxlib"):
        return Path(str(spec.origin)).parent / "include"
    site = Path(sysconfig.get_path("platlib"))  # pip hides its packages from the build, not its path
    return site / "jaxlib" / "include" if list(site.glob("jaxlib-0.10.*.dist-info")) else None


class BuildKernels(build_ext):
    """Says in one line what is missed when the compiler fails; the installation goes on (``optional``)."""

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except (CompileError, LinkError) as error:
            raise CompileError(f"{error}; {MISSED}") from error


def main() -> None:
    if reason := reason_to_skip():
        print(f"not compiled: {reason}; {MISSED}")
        setup()
        return
    headers = jaxlib_headers()
    kernels = Extension(
        NAME,
        [f"{SOURCES}/matmul.cc", f"{SOURCES}/attention.cc", f"{SOURCES}/logits.cc"],
        depends=[f"{SOURCES}/{name}.h" for name in ("kernels", "product", "avx2", "avx512", "amx_tiles")],
        include_dirs=[str(headers)] if headers else [],
        extra_compile_args=["-std=c++20", "-O3"],
        language="c++",
        optional=True,
    )
    # pip installs what setup_requires names before it builds.
    setup(
        ext_modules=[kernels],
        cmdclass={"build_ext": BuildKernels},
        setup_requires=[] if headers else [JAXLIB],
    )


if __name__ == "__main__":
    main()
