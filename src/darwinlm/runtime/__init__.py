"""Ranks, files, memory, progress and determinism."""
