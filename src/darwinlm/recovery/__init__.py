"""Recovery: the long training of the plan that was found."""
