#!/usr/bin/env python3
"""Submit work to a batch system and look after it: see --help. The same as `speechllm-submit`."""

from __future__ import annotations

import sys

from speechllm.cluster.submit import main

if __name__ == "__main__":
    sys.exit(main())
