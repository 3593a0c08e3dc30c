"""Checks, by a few calls, that a network is a denoiser of its noise process and a function of state and level alone."""
