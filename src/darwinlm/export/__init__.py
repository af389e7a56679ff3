"""Export of pruned models to the formats of other engines."""
