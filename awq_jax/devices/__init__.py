"""The devices and processes that share the work, and the host's memory."""
