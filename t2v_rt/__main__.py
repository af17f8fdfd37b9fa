"""`python -m t2v_rt` is the command `t2v-rt`."""

from __future__ import annotations

import sys

from t2v_rt.cli import main

if __name__ == "__main__":
    sys.exit(main())
