"""One call for a GPU at hand: stages, each a process with a limit of its own, every figure a line as soon as it is there.

`make gpu` runs it with the python at hand and installs nothing. Variables, of make or of the environment:

* `STAGES`: names of stages (`stages.py`), or `a` and `b` for the two runs; default `a,b`. Their order is fixed.
* `ONLY`: an op (`info_nce`, `attention`, ...) or part of a row's name; other rows, and tests of other ops, are left out.
* `BUDGET`: seconds for everything, 560 by default. A stage that would not fit any more is named and left out.
* `OUT`: folder for `gpu.jsonl` (one line a figure, with card, driver, versions and commit), logs of the stages, and what
  one run leaves for the next: ceilings of the card, and at the same commit gates of the ops and the environment. Ceilings
  and environment that are not there are measured first, whatever `STAGES` says. Default `gpu-results`.
* `DRY=1` (or `--dry-run`): every stage on the CPU with small shapes. It checks everything but the card.
* `FASTMOCO_COMMIT`: the commit to write into every line, where there is no git.

Exit code: 0 all done and passed, 1 something failed, 3 out of time and nothing failed.

What a bare machine lacks travels in `.gpu/`, which git ignores: wheels (`.gpu/*.whl`) and DALI, cut down to one Python
and one architecture (`.gpu/dali.tar.xz`, about 55 MiB). Both are unpacked into a temporary folder that later stages have
on their path; nothing is installed, nothing is downloaded. `python -m benchmarks.gpu.carry` fetches the wheels.
"""
