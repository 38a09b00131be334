"""deepspeed launch/distill.py --config examples/quickstart.yaml"""

from engine.cli import distill_main
from engine.ranks.exit import run_rank

if __name__ == "__main__":
    run_rank(distill_main)
