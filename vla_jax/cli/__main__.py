import sys

from vla_jax.cli import main

sys.exit(main())
