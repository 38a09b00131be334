"""deepspeed launch/proxy.py --config examples/proxy.yaml --genomes uniform last 0-3-6"""

from engine.cli import proxy_main
from engine.ranks.exit import run_rank

if __name__ == "__main__":
    run_rank(proxy_main)
