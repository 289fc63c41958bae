"""The families of networks, each with its presets."""
