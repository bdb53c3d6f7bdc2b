"""All measurements on a GPU in one call: stages, each a process with its own limit, and a line for
every figure at once.

`make gpu` runs it with the current python and installs nothing. Variables, of
make or of the environment:

* `STAGES`: names of stages (`stages.py`), or `a` and `b` for the two runs;
  default `a,b`. Their order is fixed.
* `ONLY`: an op (`info_nce`, `attention`, ...) or part of a row's name; other rows, and tests of
  other ops, are skipped.
* `BUDGET`: seconds for everything, 560 by default. A stage that does not fit
  any more is reported and skipped.
* `OUT`: folder for `gpu.jsonl` (one line per figure, with card, driver, versions and commit), logs
  of the stages, and state for the next run: ceilings of the card, and for the same commit gates of
  the ops and the environment. Missing ceilings and environment are measured first, whatever
  `STAGES` contains. Default `gpu-results`.
* `DRY=1` (or `--dry-run`): every stage on the CPU with small shapes. It checks
  everything except the card.
* `FASTMOCO_COMMIT`: the commit for every line, if there is no git.

Stages that time nothing run side by side: checks, tests, and the compilation of what later stages
run (`compile_ahead.py`). Compiled code is packed into `OUT/caches.tar.xz`; in `.gpu/` it is taken
by the next call, on whatever machine (`caches.py`).

Exit code: 0 all passed, 1 something failed, 3 out of time and nothing failed.

Packages that a bare machine lacks are in `.gpu/`, which git ignores: wheels (`.gpu/*.whl`); DALI,
cut down to one Python and one architecture (`.gpu/dali.tar.xz`, about 55 MiB); and NVIDIA's apex
with `amp_C` alone, built for the machine's torch (`.gpu/apex.tar.xz`). All are unpacked into a
temporary folder on the path of later stages; nothing is installed, nothing is downloaded.
`python -m benchmarks.gpu.carry` fetches the wheels. With `--tree` it packs the committed tree and
`.gpu/run.sh` (`away.sh`), which runs all of this where only that folder was copied to.
"""
