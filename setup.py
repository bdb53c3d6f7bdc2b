"""Three import roots, one distribution: `fastmoco`, `fastmoco_kernels`, `fastmoco_pipelines`.

The folders `kernels/` and `pipelines/` hold no `__init__.py` of their own: a top-level package called `kernels` would
shadow the Hugging Face package of that name for everybody who stands at the root of this repository.
"""

from setuptools import find_packages, setup

ROOTS = {
    "fastmoco": "fastmoco",
    "fastmoco_kernels": "kernels/fastmoco_kernels",
    "fastmoco_pipelines": "pipelines/fastmoco_pipelines",
}


def packages() -> list[str]:
    """Every package below the three roots, by import name."""
    return [
        name for root, folder in ROOTS.items() for name in (root, *(f"{root}.{sub}" for sub in find_packages(folder)))
    ]


setup(packages=packages(), package_dir=ROOTS)
