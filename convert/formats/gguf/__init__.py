"""GGUF files: read, written, and their metadata."""
