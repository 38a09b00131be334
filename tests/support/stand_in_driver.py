"""launch/search.py, with stand_in_proxy.py in place of the launcher: nothing is trained."""

import functools
import sys
from pathlib import Path

import ga.search
from ga.cli import search_main
from ga.jobs.pool import JobPool

StandInPool = functools.partial(JobPool, stand_in=[sys.executable, str(Path(__file__).with_name("stand_in_proxy.py"))])

if __name__ == "__main__":
    ga.search.JobPool = StandInPool
    sys.exit(search_main())
