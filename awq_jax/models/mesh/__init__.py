"""Decoders spread over the devices of a mesh."""
