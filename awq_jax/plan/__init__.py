"""Scale groups: found in the traced program, checked, proven by running it, and folded into parameters."""
