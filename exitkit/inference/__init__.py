"""Early exit: scores, thresholds and rules, from stored outputs; the executor that drops what has left; export."""
