"""The published networks, one family a file, each built from typed settings."""
