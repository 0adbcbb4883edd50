"""Builds the wheel: `make` builds libfsa.so for sm_80, sm_90a and, as PTX, later GPUs; the wheel holds it beside the
Python files. One wheel serves all versions of Python and PyTorch, since nothing is compiled against them."""

import os
import re
import shutil
import subprocess
import sys

import setuptools
from setuptools import Distribution, setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:
    sys.exit(f"error: setuptools {setuptools.__version__}: must be 70.1 or later; try pip install 'setuptools>=70.1', or "
             "leave out --no-build-isolation")  # fmt: skip

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
SCRATCH = os.path.join(ROOT, "build/wheel/python")  # git ignores it, and `make clean` removes it


def version():
    with open(os.path.join(ROOT, "fsa/fsa.h")) as f:
        return ".".join(re.findall(r"#define FSA_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", f.read()))


class BuildLibrary(build_py):
    def run(self):
        super().run()
        nvcc = os.environ.get("NVCC") or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
        if not shutil.which(nvcc):
            sys.exit(
                f"error: libfsa.so needs nvcc, which was not found at {nvcc}: install the CUDA Toolkit or set NVCC; "
                f"the CPU alone needs no library: put {os.path.dirname(os.path.abspath(__file__))} into PYTHONPATH"
            )
        make = ["make", "--no-print-directory", "-C", ROOT, f"NVCC={nvcc}", "GPU=", "ARCHS=80 90a", "PTX=80"]
        subprocess.run([*make, "BUILD=build/wheel", "build/wheel/libfsa.so.0"], check=True)
        folder = HERE if self.editable_mode else self.build_lib
        target = os.path.join(folder, "flash_sparse_attention/libfsa.so")
        self.copy_file(os.path.join(ROOT, "build/wheel/libfsa.so.0"), target)


class PlatformDistribution(Distribution):
    def has_ext_modules(self):
        return True


class NoSource(sdist):
    def run(self):
        sys.exit("error: a source distribution would lack the CUDA sources: build a wheel with `make wheel`")


class PlatformWheel(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


os.makedirs(SCRATCH, exist_ok=True)
setup(
    version=version(),
    options={"build": {"build_base": SCRATCH}, "egg_info": {"egg_base": SCRATCH}},
    distclass=PlatformDistribution,
    cmdclass={"build_py": BuildLibrary, "bdist_wheel": PlatformWheel, "sdist": NoSource},
)
