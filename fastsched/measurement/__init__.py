"""From a denoiser to `PathStatistics`: the reference path and the sensitivity sweep."""
