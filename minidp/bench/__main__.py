"""``python -m minidp.bench``"""

import sys

from minidp.bench.cli import main

if __name__ == "__main__":
    sys.exit(main())
