"""Early exit that really happens: exit rules found on a run, the executor that drops what has left, and export."""
