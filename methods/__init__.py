"""The training methods, one file each; every one is found by its entry point, as anyone else's method is."""
