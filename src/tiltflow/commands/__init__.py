"""What the command line does, one module a command family; `tiltflow.cli` is the parsing."""
