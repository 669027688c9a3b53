"""Low-rank adapters of the reference decoder: PEFT's files, the base they are for, and beside the packed weights."""
