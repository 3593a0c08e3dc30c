"""How much is tried: a little in the test suite, more by `make fuzz`."""

import os

#: Inputs over all tests of this folder.
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "100"))

#: Processes killed: 50 of 10,000 inputs.
KILLS = max(3, EXAMPLES // 200)
