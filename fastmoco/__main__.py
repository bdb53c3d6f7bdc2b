"""`python -m fastmoco`."""

import sys

from fastmoco.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
