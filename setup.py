"""Which folders are packages, and how the C++ extension is built; everything else is in
pyproject.toml.

`kernels/` is mapped rather than packaged: a top-level package of that name would be taken for
Hugging Face's. SELFNPO_BUILD_CPP=0 leaves the extension out. Without torch or a compiler the
project installs without it, and says so; SELFNPO_REQUIRE_CPP=1 makes that a failure.
"""

import os
import platform
import sys
from pathlib import Path

from setuptools import find_packages, setup

CSRC = Path("csrc")
REQUIRED = os.environ.get("SELFNPO_REQUIRE_CPP") == "1"
COMPILE = ["-O3", "-std=c++20", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=off", "-g0"]
COMPILE += ["-Wall", "-Wno-psabi", "-Wno-unknown-pragmas"]
# One set of objects for each instruction set; csrc/cpu/dispatch.cpp chooses at run time.
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY_AVX2"]
# With AVX-512 the noise is made in wider registers; all else waits for memory, and stays as it is.
# GCC 12's own headers leave a register uninitialised on purpose.
AVX512 = [*AVX2, "-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-DSELFNPO_AVX512", "-Wno-uninitialized"]
SETS = {"DEFAULT": [], "AVX2": AVX2, "AVX512": AVX512}


def say(line: str) -> None:
    """To the person who installs; pip shows standard error with -v, or when the build fails."""
    print(f"selfnpo_fast: {line}", file=sys.stderr)


def without(reason: str) -> dict:
    """Install without the extension, or fail where it is required."""
    if REQUIRED:
        raise SystemExit(f"selfnpo_fast: SELFNPO_REQUIRE_CPP=1, and the C++ extension cannot be built: {reason}")
    say(f"installing without the C++ extension ({reason}); fused ops on CPU tensors will be the PyTorch reference")
    return {}


def extension() -> dict:
    """setup()'s arguments for the extension."""
    if os.environ.get("SELFNPO_BUILD_CPP", "1") == "0":
        return without("SELFNPO_BUILD_CPP=0")
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        return without(f"torch is not installed where it is built: {error}; use --no-build-isolation")
    sets = SETS if platform.machine() in ("x86_64", "AMD64") else {"DEFAULT": []}

    class Build(BuildExtension):
        """Compiles the kernels once per instruction set and links them as extra objects."""

        def build_extension(self, ext) -> None:
            """Build, or install without where that is allowed."""
            try:
                for name, flags in sets.items():
                    ext.extra_objects += self._kernels(ext, name, flags)
                super().build_extension(ext)
            except Exception as error:  # distutils' and ninja's errors share no type
                without(f"{type(error).__name__}: {error}")

        def _kernels(self, ext, name: str, flags: list[str]) -> list[str]:
            sources = sorted(str(path) for path in (CSRC / "cpu" / "kernels").glob("*.cpp"))
            arguments = [*COMPILE, *flags, f"-DCPU_CAPABILITY={name}", "-D_GLIBCXX_USE_CXX11_ABI=1"]
            folder = os.path.join(os.path.abspath(self.build_temp), name)
            return self.compiler.compile(
                sources, output_dir=folder, include_dirs=ext.include_dirs, extra_postargs=arguments, depends=ext.depends
            )

    bindings = sorted(str(path) for path in (CSRC / "cpu").glob("*.cpp"))
    module = CppExtension(
        "selfnpo_kernels._cpp",
        [str(CSRC / "module.cpp"), *bindings],
        depends=sorted(str(path) for path in CSRC.rglob("*.h")),
        extra_compile_args=[*COMPILE, *(["-DSELFNPO_X86"] if "AVX2" in sets else [])],
        extra_link_args=["-fopenmp"],
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}}


setup(
    packages=[
        *find_packages(include=["selfnpo_fast", "selfnpo_fast.*"]),
        "selfnpo_fast.configs",
        *find_packages("kernels", include=["selfnpo_kernels", "selfnpo_kernels.*"]),
    ],
    package_dir={"selfnpo_kernels": "kernels/selfnpo_kernels", "selfnpo_fast.configs": "configs"},
    package_data={"selfnpo_fast": ["assets/**/*"], "selfnpo_fast.configs": ["*.yaml"]},
    **extension(),
)
