"""`python -m vlft` is `vlft`, so `torchrun ... -m vlft train` works."""

import sys

from vlft.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
