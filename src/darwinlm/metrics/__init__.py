"""Measures of a model: KL divergence, perplexity and latency."""
