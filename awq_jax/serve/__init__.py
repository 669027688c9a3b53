"""Packed weights in use: load, Model, generate; bind and dot for other people's models."""
