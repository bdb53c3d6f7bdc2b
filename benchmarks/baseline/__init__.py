"""A plain PyTorch MoCo v3 as people write it today: what fastmoco is compared with.

Written from the paper and its published settings alone, with torch's own parts. It shares no
fast path with fastmoco, only the config, the names of the parameters, and the random draws of the
order and the views, so that both train on the same numbers.
"""
