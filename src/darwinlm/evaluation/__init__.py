"""Evaluation: KL, perplexity, zero-shot tasks, sizes and speed."""
