"""``python -m awq_jax.lm_eval``: lm-eval's own command line, which knows the model ``awq-jax`` too."""

import sys

from awq_jax.lm_eval.command import main

sys.exit(main())
