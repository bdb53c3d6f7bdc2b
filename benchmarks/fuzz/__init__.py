"""`python -m benchmarks.fuzz`: changed inputs of every parser, and what becomes of them.

An input is a function of (seed, target, number): a sound file, made by the project's own writers,
and changes that mostly know its format (`changes.py`). It is given to the parser in a child process
with limits on time and memory. Outcomes are: refused by an error that names the reason; accepted;
and violations, which make the exit code 1: any other error, the end of the process, more than 5 s
or 1 GB, and wrong pixels, members or labels without an error, where another library or the sound
file tells (`judged.py`). A flipped bit in the scan of a JPEG gives the same wrong pixels in every
decoder; only the crc32 in the index detects it, and such inputs are counted separately.

`--keep FOLDER` stores of each kind of violation the smallest input, and `--only TARGET:NUMBER`
repeats one.
"""
