"""The algorithm on arrays alone: one matrix, its grid, its rounding, its scale."""
