"""The search: plans proposed without tensors, scored with them."""
