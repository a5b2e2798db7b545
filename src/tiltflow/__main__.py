"""`python -m tiltflow`, for torchrun."""

from tiltflow.cli.main import main

main()
