"""The loop that one writes around stock `AutoencoderKL`, with the recipe of diffusers' own example: what a run of this
package has to beat at the same budget. README.md beside this file says what is compared.

    python benchmarks/stock_loop.py --data.name folder --data.root data --data.channels 3 --max_images 9999 --out stock
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Literal

import torch
from jsonargparse import ArgumentParser
from side_by_side import stock_vae
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from diffusers_vae.data import DataConfig, load_data
from diffusers_vae.engine.launch import peak_memory
from diffusers_vae.images.ranges import to_model_range
from diffusers_vae.losses.perceptual import LPIPS


def main(arguments: Sequence[str] | None = None) -> None:
    # defaults: examples/research_projects/autoencoderkl/train_autoencoderkl.py at 2e348b8 in huggingface/diffusers, the
    # model's of stabilityai/sd-vae-ft-mse
    parser = ArgumentParser(description=__doc__)
    parser.add_class_arguments(DataConfig, "data")
    parser.add_argument("--block_out_channels", type=list[int], default=[128, 256, 512, 512])
    parser.add_argument("--latent_channels", type=int, default=4)
    parser.add_argument("--layers_per_block", type=int, default=2)
    parser.add_argument("--norm_num_groups", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--max_images", type=int, required=True, help="Trained on, repeated ones counted again.")
    parser.add_argument("--learning_rate", type=float, default=4.5e-6)
    parser.add_argument("--kl_weight", type=float, default=1e-6)
    parser.add_argument("--lpips", metavar="FOLDER", help="Add 0.5 LPIPS (vgg), whose weights lie in this folder.")
    parser.add_argument("--mixed_precision", type=Literal["no", "bf16"], default="no", help="Autocast dtype.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, help="Folder for the model.")
    settings = parser.parse_args(arguments)
    torch.manual_seed(settings.seed)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")

    data = parser.instantiate(settings).data
    images, _ = load_data(data, progress=True, memory_limit=sys.maxsize)
    loader = DataLoader(TensorDataset(to_model_range(images.pixels)), settings.batch_size, shuffle=True)
    vae = stock_vae(
        data.channels,
        settings.block_out_channels,
        layers_per_block=settings.layers_per_block,
        latent_channels=settings.latent_channels,
        norm_num_groups=settings.norm_num_groups,
        sample_size=max(data.size),
    ).to(device)
    vae.train()
    lpips = LPIPS("vgg", settings.lpips).to(device) if settings.lpips else None
    optimizer = torch.optim.AdamW(vae.parameters(), settings.learning_rate, betas=(0.9, 0.999), weight_decay=1e-2)

    bar = tqdm(total=settings.max_images, unit="img")
    while bar.n < settings.max_images:
        for (batch,) in loader:
            batch = batch.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.mixed_precision == "bf16"):
                posterior = vae.encode(batch).latent_dist
                reconstructions = vae.decode(posterior.sample()).sample.float()
                kl = posterior.kl().sum() / len(batch)
            error = mse_loss(reconstructions, batch, reduction="none")
            if lpips is not None:  # without gradient in the example, where it trains nothing
                error = error + 0.5 * lpips(batch, reconstructions).view(-1, 1, 1, 1)
            error = error.sum() / len(batch)
            loss = error + settings.kl_weight * kl
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            bar.update(len(batch))
            bar.set_postfix(loss=loss.item(), error=error.item(), kl=kl.item())
            if bar.n >= settings.max_images:
                break
    bar.close()
    print(f"at most {peak_memory(device) / 2**20:,.0f} MiB of memory")
    vae.save_pretrained(settings.out)


if __name__ == "__main__":
    main()
