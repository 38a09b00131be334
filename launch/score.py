"""python launch/score.py --models runs/quickstart --tasks STS-B --task.data_dir data/glue"""

import sys

from engine.cli import score_main

if __name__ == "__main__":
    sys.exit(score_main())
