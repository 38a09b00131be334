"""python launch/export.py --run RUN_DIR --to DIR"""

import sys

from engine.cli import export_main

if __name__ == "__main__":
    sys.exit(export_main())
