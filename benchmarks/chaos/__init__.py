"""`python -m benchmarks.chaos` (`make chaos`): runs that are disturbed at random, and the bits in
which they end.

A story is one run in a folder of its own, in one process or in two (`ddp`, `fsdp`). Its command is
started again and again: before a start, a file may be damaged or replaced, or a limit set; during
it, processes are killed, stopped and asked to end. If a start is refused, the cure that the message
names is done. In the end the same command must finish, and the weights, the momentum encoder, the
optimizer, the state and the rows of the metrics are compared with those of the undisturbed run of
that mode. Counted are the events, the ends, refusals by name, processes that are left 10 s after
their command, and waits above 60 s without any output.

The plan of a story is a function of (seed, number): `--only N` plays the story of event N again, up
to this event. The moments are steps or seconds, so the same plan may meet another line of code.
"""
