"""A model of the time of one step on 1 to 4096 processes: pure arithmetic.

    layout    units and norms of an objective that ranks exchange
    messages  collectives of one step, with their bytes
    network   seconds of a collective
    step      seconds of a step, what overlaps, what limits it
    keys      gathered keys against the ring
    limits    what breaks first when batches and sets grow

Its GPU figures are outputs of this model, not measurements. On CPU ranks it is calibrated and
checked by `python -m benchmarks run scale`.
"""
