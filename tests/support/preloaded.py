"""What a run imports, some of it late: the server that launches are forked from imports it once, for all of them."""

import diffusers_vae.commands
import diffusers_vae.latent_cache  # noqa: F401
