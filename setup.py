"""Three import roots, one distribution: `fastmoco`, `fastmoco_kernels`, `fastmoco_pipelines`.

The folders `kernels/` and `pipelines/` hold no `__init__.py` of their own: a top-level package
called `kernels` would shadow the Hugging Face package of that name for everybody who stands at the
root of this repository.
"""

from setuptools import Extension, find_packages, setup

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


# Plain C without Python in it, loaded by ctypes. Optional: without a compiler plain torch does the
# same, slowly. No contraction: a product and a sum rounded once would not be Pillow's. The other
# flags change no result; without them GCC leaves the loops over levels as they are, or unrolls them
# before it could make vectors of them.
NATIVE = "kernels/fastmoco_kernels/cut_views/native"
FLAGS = [
    "-std=c11",
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-loop-unroll-and-jam",
]
CUT_VIEWS = Extension(
    "fastmoco_kernels.cut_views._native",
    sources=[f"{NATIVE}/{name}.c" for name in ("blur", "color", "cut", "resize", "transpose")],
    depends=[f"{NATIVE}/views.h"],
    extra_compile_args=[*FLAGS, "-fvisibility=hidden"],
    libraries=["m"],
    optional=True,
    py_limited_api=True,  # it uses no API at all: one file for every version
)

setup(packages=packages(), package_dir=ROOTS, ext_modules=[CUT_VIEWS])
