"""A model family as data, and models cut out of its weights."""
