"""`python -m fastmoco`."""

import sys

from fastmoco.cli import main

if __name__ == "__main__":
    sys.exit(main())
