"""The devices and processes that share the work of a run, and the host's memory."""
