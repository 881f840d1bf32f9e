"""The one part that is compiled, if a compiler is there: kernels for CPU. All else is in pyproject.toml."""

from pathlib import Path

import jaxlib
from setuptools import Extension, setup

SOURCES = "qwen2_core/kernels/cpu/csrc"

setup(
    ext_modules=[
        Extension(
            "qwen2_core.kernels.cpu._kernels",
            [f"{SOURCES}/matmul.cc", f"{SOURCES}/attention.cc"],
            depends=[f"{SOURCES}/kernels.h", f"{SOURCES}/amx_tiles.h"],
            include_dirs=[str(Path(jaxlib.__file__).parent / "include")],
            extra_compile_args=["-std=c++20", "-O3"],
            language="c++",
            optional=True,
        )
    ]
)
