"""`python -m tiltflow`, for torchrun."""

from tiltflow.cli import main

main()
