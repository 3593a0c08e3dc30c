"""Solvers, schedules, and the loop that runs one along the other."""
