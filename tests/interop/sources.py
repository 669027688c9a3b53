"""Which quantized weights the tests write."""

Source = tuple[int, int, bool]  # bits, group size, symmetric
ASYMMETRIC: Source = (4, 64, False)
SYMMETRIC: Source = (4, 64, True)
