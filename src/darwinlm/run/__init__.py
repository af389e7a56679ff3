"""Run directories: their files, lock and models."""
