"""Optimal noise schedules for diffusion and flow models."""
