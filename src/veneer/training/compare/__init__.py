"""Comparison of methods on one base and one data set: ``study.py`` trains, ``measure.py`` measures, ``report.py`` shows the result."""

from __future__ import annotations

from veneer.training.compare.study import Comparison, Contestant, compare

__all__ = ["Comparison", "Contestant", "compare"]
