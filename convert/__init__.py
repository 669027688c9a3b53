"""Checkpoint files: readers, writers and the mapping of names. Knows files and names only."""
