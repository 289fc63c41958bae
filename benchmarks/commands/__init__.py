"""The harness's commands, one file per verb; modules are imported when used, so that help answers at once."""
