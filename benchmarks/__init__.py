"""The harness: campaigns of runs, their tables and figures, recipes, published numbers and speed."""
