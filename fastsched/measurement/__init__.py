"""From a denoiser to `PathStatistics`: the reference path, and deviated ones that tell how errors are passed on."""
