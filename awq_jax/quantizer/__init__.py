"""Parameter trees to arrays, through the algorithm, and back to parameter trees with packed leaves."""
