"""How levels are given to a scheduler of diffusers, and verified; `diffusers.conventions` says how one is read."""
