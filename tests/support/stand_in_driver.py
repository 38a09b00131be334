"""launch/search.py, with stand_in_proxy.py in place of the launcher: nothing is trained."""

import functools
import sys
from pathlib import Path

import ga.search
from ga.cli import search_main
from ga.jobs.pool import JobPool

if __name__ == "__main__":
    stand_in = Path(__file__).with_name("stand_in_proxy.py")
    ga.search.JobPool = functools.partial(JobPool, stand_in=[sys.executable, str(stand_in)])
    sys.exit(search_main())
