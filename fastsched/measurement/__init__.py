"""From a denoiser to `PathStatistics`: the reference path, and deviated ones that show how errors are passed on."""
