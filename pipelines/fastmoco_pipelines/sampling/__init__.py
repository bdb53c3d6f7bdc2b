"""Which sample comes when: pure functions of (seed, epoch, position), in numpy alone."""
