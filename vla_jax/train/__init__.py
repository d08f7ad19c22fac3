"""Training."""

import os

# epath, through which Orbax and we reach gs://, would load TensorFlow wherever that is installed: it decides on its first path.
os.environ.setdefault("EPATH_USE_TF", "0")
