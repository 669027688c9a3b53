"""Many requests at once: a cache with a fixed number of slots, which requests enter and leave between steps."""
