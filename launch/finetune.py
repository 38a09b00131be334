"""deepspeed launch/finetune.py --config examples/finetune.yaml"""

import sys

from engine.cli import finetune_main

if __name__ == "__main__":
    sys.exit(finetune_main())
