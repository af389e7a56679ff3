"""Statistics of the dense model's activations, block by block."""
