"""Model families as data, and models cut out of their weights."""
