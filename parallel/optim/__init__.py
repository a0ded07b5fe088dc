"""Optimizers of wastenot's own: Adapprox."""

from .adapprox import Adapprox
from .report import ParameterReport

__all__ = ["Adapprox", "ParameterReport"]
