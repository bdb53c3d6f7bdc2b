"""Weights of encoders in the formats of other packages: reading, fitting, writing, comparing.

`names` has the names of every format as tables. `reading` opens files without running anything in
them, `foreign` finds out what they contain, `fitting` puts it into the encoder of a run, `writing`
makes files of other formats, and `judging` computes features by the packages that read them.
"""
