"""Commands that look at runs and models: evaluate, speed, doctor, inspect."""
