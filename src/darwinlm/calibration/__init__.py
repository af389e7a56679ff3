"""Statistics of the dense model's activations, layer by layer."""
