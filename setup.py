"""The one part that is compiled, if a compiler is there: kernels for CPU. All else is in pyproject.toml."""

from pathlib import Path

import jaxlib
from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "_cpu_product",
            ["cpu_product.cc", "cpu_attention.cc"],
            depends=["cpu_kernels.h", "cpu_tiles.h"],
            include_dirs=[str(Path(jaxlib.__file__).parent / "include")],
            extra_compile_args=["-std=c++20", "-O3"],
            language="c++",
            optional=True,
        )
    ]
)
