"""Exit policies compared on the stored outputs of finished runs."""
