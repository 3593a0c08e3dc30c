"""Schedulers of diffusers: how one is read, and how levels are given to it, and verified."""
