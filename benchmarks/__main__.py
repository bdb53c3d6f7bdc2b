"""`python -m benchmarks`."""

import os
import sys

if __name__ == "__main__":
    # Before torch is imported: its profiler would print lines of its own.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    from benchmarks.command import main

    sys.exit(main())
