import sys

from vla_jax.cli import program

sys.exit(program())
