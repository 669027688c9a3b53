"""``python -m awq_jax``: as ``awq-jax``."""

import sys

from awq_jax.cli.entry import main

sys.exit(main())
