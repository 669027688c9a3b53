"""A checkpoint quantized decoder block by decoder block, from disk to disk, resumable."""
