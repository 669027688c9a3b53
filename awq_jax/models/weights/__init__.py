"""Tensors of checkpoints to parameters of the decoder and back."""
