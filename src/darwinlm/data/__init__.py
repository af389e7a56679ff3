"""Text: documents, tokens and splits."""
