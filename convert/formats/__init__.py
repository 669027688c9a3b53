"""One format a file, which ends in its Format."""
