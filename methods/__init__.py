"""Training methods, one per file; each is found through its entry point, like the methods of other packages."""
