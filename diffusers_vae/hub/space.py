"""The files of a Space that shows a published autoencoder: see `reports.demo`."""

from __future__ import annotations

import json

from .config import HubConfig

APP = '''"""Demo of the autoencoder {repo_id}."""

from diffusers_vae.reports.demo import show

show([{repo_id!r}]{revision})
'''
REQUIREMENTS = "diffusers-vae[demo]>=0.1.0\n"
README = """---
title: {title}
emoji: 🔍
colorFrom: indigo
colorTo: gray
sdk: gradio
app_file: app.py
pinned: false
models:
- {repo_id}
{license}---

Try the autoencoder [{repo_id}](https://huggingface.co/{repo_id}) on your own images: reconstructions, latent channels,
sliders along latent directions, and interpolation between two images.

On your own machine, the same page:

```bash
pip install "diffusers-vae[demo]"
diffusers-vae demo {repo_id}{flag}
```
{private}"""
PRIVATE = """
The model is private: add a token that may read it as the secret `HF_TOKEN` in the settings of this Space.
"""


def space_files(config: HubConfig) -> dict[str, bytes]:
    """Return the files of the Space of the model in `config.repo_id`, by name."""
    repo_id, revision = str(config.repo_id), config.revision
    readme = README.format(
        title=json.dumps(f"{repo_id.partition('/')[2]} demo"),
        repo_id=repo_id,
        license=f"license: {config.license}\n" if config.license else "",
        flag=f" --revision {revision}" if revision else "",
        private=PRIVATE if config.private else "",
    )
    app = APP.format(repo_id=repo_id, revision=f", revision={revision!r}" if revision else "")
    return {"README.md": readme.encode(), "app.py": app.encode(), "requirements.txt": REQUIREMENTS.encode()}
