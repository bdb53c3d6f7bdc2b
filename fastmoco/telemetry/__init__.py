"""What a run says about itself: speed (`metrics`), health (`stability`), where it is written (`sinks`, `console`)."""
