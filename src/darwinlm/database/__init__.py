"""The database: every site at every level, pruned with second-order information."""
