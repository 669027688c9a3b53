"""How many bits each weight gets, where the bits of all together are given."""
