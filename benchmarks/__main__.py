"""`python -m benchmarks`."""

import sys

from benchmarks.registry import main

if __name__ == "__main__":
    sys.exit(main())
