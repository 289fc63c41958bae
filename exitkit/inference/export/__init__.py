"""Export: one program per stage, the exit policy, and a runner that does not need exitkit."""
