"""The pruned model in the form that others load."""
