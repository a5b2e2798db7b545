"""From a config to a run: checks, plan, model and stage."""
