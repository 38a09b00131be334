"""deepspeed launch/proxy.py --config examples/proxy.yaml --genomes uniform last 0-3-6"""

import sys

from engine.cli import proxy_main

if __name__ == "__main__":
    sys.exit(proxy_main())
