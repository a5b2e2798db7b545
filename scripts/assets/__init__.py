"""How the embedded default's weights are made; run `python scripts/build_assets.py`."""
