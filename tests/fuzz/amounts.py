"""How much is tried: a little in the test suite, more by `make fuzz`."""

import os

from hypothesis import HealthCheck, settings

#: Inputs over all tests of this folder.
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "100"))

#: Processes killed: 50 of 10,000 inputs.
KILLS = max(3, EXAMPLES // 200)


def of_all(fraction):
    """Settings of a test with a part of the inputs; new ones every time by `make fuzz`, the same in the suite."""
    few = EXAMPLES <= 100
    return settings(
        max_examples=max(5, round(fraction * EXAMPLES)),
        deadline=None,
        derandomize=few,
        database=None,
        print_blob=not few,
        suppress_health_check=list(HealthCheck),
    )
