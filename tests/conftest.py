import os
import random

import pytest
import torch

# The tests' tensors are small: threads would only wait for each other.
torch.set_num_threads(1)


def seed() -> None:
    """Seed the global generators, with TEST_SEED if it is set: some tests make random networks or data with them."""
    number = int(os.environ.get("TEST_SEED", "0"))
    random.seed(number)
    torch.manual_seed(number)


def pytest_collectstart(collector: pytest.Collector) -> None:
    seed()  # for what a test file makes when it is imported


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    seed()
