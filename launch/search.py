"""python launch/search.py --config examples/search.yaml"""

import sys

from ga.cli import search_main

if __name__ == "__main__":
    sys.exit(search_main())
