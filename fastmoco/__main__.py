"""`python -m fastmoco`."""

import sys

from fastmoco_pipelines.processes import leave_current_folder

leave_current_folder()

from fastmoco.cli.start import main  # noqa: E402 (it imports what may be in the current folder)

if __name__ == "__main__":
    sys.exit(main())
