"""FLUX.2-dev: the same network as klein's."""

from tiltflow.formats.keys.flux2 import LAYOUT

__all__ = ["LAYOUT"]
