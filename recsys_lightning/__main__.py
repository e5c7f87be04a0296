"""``python -m recsys_lightning`` is `recsys`."""

import sys

from recsys_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
