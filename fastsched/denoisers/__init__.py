"""Noise processes, and denoisers of every parameterisation."""
