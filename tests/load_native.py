"""Load the C part of the installed package, without torch or any other dependency: cibuildwheel runs this
for each wheel. It prints the file.
"""

import ctypes
import importlib.util
from pathlib import Path

spec = importlib.util.find_spec("fastmoco_kernels")
if spec is None or spec.origin is None:
    raise SystemExit("fastmoco_kernels is not installed")
found = sorted(Path(spec.origin).parent.rglob("*.so"))
if [file.name for file in found] != ["_native.abi3.so"]:
    raise SystemExit(f"libraries in {Path(spec.origin).parent}: {found}, expected _native.abi3.so")
library = ctypes.CDLL(str(found[0]))
for name in ("fastmoco_cut_views", "fastmoco_cut_levels", "fastmoco_cut_views_bicubic_part"):
    getattr(library, name)
print(found[0])
