"""Measuring: KL and perplexity, sizes and speed."""
