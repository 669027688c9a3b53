"""Packed weights as NumPy arrays: words, codes, rearranged and made to fit."""
