"""python launch/measure.py --models runs/quickstart"""

import sys

from engine.cli import measure_main

if __name__ == "__main__":
    sys.exit(measure_main())
