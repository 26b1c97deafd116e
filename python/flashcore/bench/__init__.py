"""Measuring flashcore beside other libraries: the parts of `python -m flashcore bench`, one file each.

A run goes one way: words → `cases` → `stage` (device, clock, arrays) → `calls` and `peers` (contenders) → `timing`
(samples, taken in turn) → `results` (JSON, CSV) → `report`, `compare`, `plot`.
"""
