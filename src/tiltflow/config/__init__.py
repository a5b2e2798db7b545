"""A run's configuration: its schema, its rules, the recipes and the files that it names."""
