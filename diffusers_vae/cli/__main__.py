"""`python -m diffusers_vae.cli`."""

import sys

from . import main

sys.exit(main())
