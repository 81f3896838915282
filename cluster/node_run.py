"""One node of a job, as `python -m speechllm.cluster.node JOB.json`."""

import sys

from speechllm.cluster.node import main

if __name__ == "__main__":
    sys.exit(main())
