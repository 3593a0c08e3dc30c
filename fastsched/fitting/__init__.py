"""Find a schedule by running the sampler: candidates, audition, tuning."""
