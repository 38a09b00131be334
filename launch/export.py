"""python launch/export.py --run RUN_DIR --output_dir DIR"""

import sys

from engine.cli import export_main

if __name__ == "__main__":
    sys.exit(export_main())
