"""`python -m decode_worker --config FILE`: a decode worker as a process of its own."""

import sys

from branchline.process import run

if __name__ == "__main__":
    sys.exit(run("decode_worker"))
