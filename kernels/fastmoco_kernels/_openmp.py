"""OpenMP's threads spin for a short time while they wait. Imported before torch.

This package imports no other one of the repository, so it has the two lines of
`fastmoco_pipelines.openmp` again, whose docstring has the reason; a test compares them.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
