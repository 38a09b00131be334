"""python launch/check_hosts.py --hostfile hostfile"""

import sys

from engine.cli import check_hosts_main

if __name__ == "__main__":
    sys.exit(check_hosts_main())
