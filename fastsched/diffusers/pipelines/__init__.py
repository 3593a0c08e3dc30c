"""Whole calls of a pipeline: to measure it, to fit a schedule by its runs, to time it."""
