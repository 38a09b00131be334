"""deepspeed launch/distill.py --config examples/quickstart.yaml"""

import sys

from engine.cli import distill_main

if __name__ == "__main__":
    sys.exit(distill_main())
