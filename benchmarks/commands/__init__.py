"""The commands of the benchmarks, one file per command. Modules are imported on use, so that `--help` is fast."""
