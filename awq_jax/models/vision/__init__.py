"""Vision towers and what joins them to the reference decoder."""
