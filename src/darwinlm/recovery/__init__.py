"""Recovery: the long training of the plan found."""
