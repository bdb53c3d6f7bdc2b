"""A module whose import takes for ever in the process of a sink."""

import sys
import time

if "fastmoco.telemetry.trackers.messages" in sys.modules:
    time.sleep(3600)
Never = None
