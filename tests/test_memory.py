"""Freed memory is kept: large tensors made again and again cost no page faults."""

import os
import subprocess
import sys

import pytest

MEASURE = """
import resource, sys, torch
from recsys_lightning.memory import keep_freed_memory
done = keep_freed_memory() if "keep" in sys.argv else None
for _ in range(12):
    torch.ones(12 * 2**20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(40):
    torch.ones(12 * 2**20)
print(done, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def measured(*arguments, **variables):
    clean = {name: value for name, value in os.environ.items() if "MALLOC" not in name and name != "GLIBC_TUNABLES"}
    command = [sys.executable, "-c", MEASURE, *arguments]
    found = subprocess.run(command, env=clean | variables, capture_output=True, text=True, check=True)
    done, faults = found.stdout.split()
    return done, int(faults)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the GNU C library is Linux's")
def test_tensors_of_one_size_made_again_cost_no_page_faults():
    _, by_default = measured()
    done, faults = measured("keep")
    if done == "False":
        pytest.skip("not the GNU C library")
    assert faults < by_default / 10


def test_an_environment_that_tunes_the_allocator_is_left_alone():
    assert measured("keep", MALLOC_ARENA_MAX="2")[0] == "False"
