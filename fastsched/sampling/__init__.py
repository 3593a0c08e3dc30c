"""Solvers, schedules, and the loop that runs a solver along a schedule."""
