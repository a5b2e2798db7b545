"""The watch against reward hacking: what it measures, when it warns, what it remembers."""
