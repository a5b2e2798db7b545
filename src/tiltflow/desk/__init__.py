"""`tiltflow desk`: one page in a browser over runs and evaluations, on this machine alone."""
