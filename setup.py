"""Three import roots, one distribution: `fastmoco`, `fastmoco_kernels`, `fastmoco_pipelines`.

The folders `kernels/` and `pipelines/` hold no `__init__.py` of their own: a top-level package
called `kernels` would shadow the Hugging Face package of that name for everybody who stands at the
root of this repository.
"""

import os
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel

ROOTS = {
    "fastmoco": "fastmoco",
    "fastmoco_kernels": "kernels/fastmoco_kernels",
    "fastmoco_pipelines": "pipelines/fastmoco_pipelines",
}


def packages() -> list[str]:
    """Every package below the three roots, by import name."""
    return [
        name
        for root, folder in ROOTS.items()
        for name in (root, *(f"{root}.{sub}" for sub in find_packages(folder)))
    ]


# Plain C without Python in it, loaded by ctypes. Without a compiler plain torch does the same, slowly.
# No contraction: a product and a sum rounded once would not be Pillow's. The other flags change no
# result; without them GCC leaves the loops over levels as they are, or unrolls them before it could
# make vectors of them.
NATIVE = "kernels/fastmoco_kernels/cut_views/native"
FLAGS = [
    "-std=c11",
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-loop-unroll-and-jam",
]
PURE = {"": None, "0": False, "1": True}


def native_parts() -> list[Extension]:
    """The C part, or none.

    Variable FASTMOCO_PURE: 1 leaves it out, 0 refuses to build without it; by default it is left out
    where it cannot be compiled.

    Raises:
        SystemExit: for another value.
    """
    text = os.environ.get("FASTMOCO_PURE", "")
    if text not in PURE:
        raise SystemExit(
            f"FASTMOCO_PURE={text!r}: must be 1 (without the C part), 0 (fail if it cannot be "
            "compiled) or unset (with it, if there is a C compiler)"
        )
    pure = PURE[text]
    if pure:
        return []
    cut_views = Extension(
        "fastmoco_kernels.cut_views._native",
        sources=[f"{NATIVE}/{name}.c" for name in ("blur", "color", "cut", "resize", "transpose")],
        depends=[f"{NATIVE}/views.h"],
        extra_compile_args=[*FLAGS, "-fvisibility=hidden"],
        libraries=["m"],
        optional=pure is None,
        py_limited_api=True,  # it uses no API at all: one file for every version
    )
    return [cut_views]


class Wheel(bdist_wheel):
    """A wheel for every Python 3: of this platform with the C part, of any without it."""

    def get_tag(self) -> tuple[str, str, str]:
        """The tags, by what was built: an optional part that could not be compiled is missing."""
        platform = super().get_tag()[2]
        built = Path(self.get_finalized_command("build").build_lib).rglob("_native*.so")
        return "py3", "none", platform if any(built) else "any"


setup(
    packages=packages(),
    package_dir=ROOTS,
    ext_modules=native_parts(),
    cmdclass={"bdist_wheel": Wheel},
)
