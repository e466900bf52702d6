"""`python -m s2srm`, which torchrun starts."""

import sys

from s2srm.cli import main

sys.exit(main())
