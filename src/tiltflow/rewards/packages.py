"""Packages that a builtin reward needs beside those of every installation: an extra of its name."""

from __future__ import annotations

import importlib

NEEDS = {"hpsv2": ("ftfy",), "ocr": ("rapidocr", "onnxruntime")}


def require_packages(name: str) -> None:
    """Raises ValueError if a package that the reward `name` needs is not installed."""
    for package in NEEDS.get(name, ()):
        try:
            importlib.import_module(package)
        except ImportError as error:
            needs = " and ".join(NEEDS[name])
            raise ValueError(
                f"reward {name!r}: it needs {needs}: pip install 'tiltflow[{name}]'"
            ) from error
