"""Search for a plan: proposals without tensors, and their scores."""
