"""Which settings that change only speed are fastest on a machine: what `fastmoco tune` measures,
in which order, and the script that it writes. Imports neither torch nor DALI."""
