"""Predicted memory and time of a run."""
