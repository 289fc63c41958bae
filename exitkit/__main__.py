"""`python -m exitkit`, which is what `torchrun -m exitkit` starts."""

from exitkit.cli import main

if __name__ == "__main__":
    main()
