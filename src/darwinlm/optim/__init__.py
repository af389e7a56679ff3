"""Learning rates, and the optimizer of trials."""
