"""deepspeed launch/finetune.py --config examples/finetune.yaml"""

from engine.cli import finetune_main
from engine.ranks.exit import run_rank

if __name__ == "__main__":
    run_rank(finetune_main)
