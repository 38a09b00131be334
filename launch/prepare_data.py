"""python launch/prepare_data.py --config examples/quickstart_corpus.yaml"""

import sys

from engine.cli import prepare_main

if __name__ == "__main__":
    sys.exit(prepare_main())
