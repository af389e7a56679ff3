"""DarwinLM: evolutionary structured pruning of large language models."""
