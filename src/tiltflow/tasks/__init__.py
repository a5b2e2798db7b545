"""What one can ask for, one module a task; the command line is only the parsing above it."""
