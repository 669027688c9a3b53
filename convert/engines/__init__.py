"""What serving engines would do with a checkpoint: what is looked at, rules, and the verdicts that follow from them."""
