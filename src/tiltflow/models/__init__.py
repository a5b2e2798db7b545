"""Networks as velocities: what a backbone is, adapters over one base, the roles of a run."""
