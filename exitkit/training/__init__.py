"""Training: phases, epochs, checkpoints, resuming and records; runs in memory for custom training loops."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name != "train":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Imported when used: commands that only read progress files must not load torch.
    from exitkit.training.loop import train

    return train
