#!/usr/bin/env python3
"""The command line of the local cluster: `python3 hack/cluster/cluster.py --help`.

Runs before any virtual environment exists, so everything below it is standard library only.
"""

import sys

if sys.version_info < (3, 11):
    sys.exit(f"cluster: python3 is {sys.version.split()[0]}, 3.11 or newer is needed; run this with python3.11")

from local_cluster.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
