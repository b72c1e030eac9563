"""`python -m prefill_worker --config FILE`: a prefill worker as a process of its own."""

import sys

from branchline.process import run

if __name__ == "__main__":
    sys.exit(run("prefill_worker"))
