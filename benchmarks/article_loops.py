"""The training loops of the three articles with code, as plainly as they describe them: the baseline to be faster
than, at equal loss.

    python article_loops.py mlp-z2  --root DATA --epochs 2   # article 001: z=2, cross entropy, batch 50, 20 epochs
    python article_loops.py mlp-z20 --root DATA --epochs 2   # article 003: z=20, squared error, batch 128, 10 epochs
    python article_loops.py conv    --root DATA --steps 20   # article 000: diffusers' blocks, batch 32, 30 epochs

DATA holds MNIST/raw with the four unpacked IDX files (article 000 uses QMNIST, whose training images are MNIST's,
rebuilt). One JSON line per epoch (or for the steps): losses are sums over pixels in [0, 1] and latents, per image;
seconds are of the training loop alone.
"""

import argparse
import json
import time

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import Decoder, DiagonalGaussianDistribution, Encoder
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms


class MLP(nn.Module):
    def __init__(self, latent_dim, bernoulli):
        super().__init__()
        self.bernoulli = bernoulli
        self.hidden, self.mean, self.logvar = (
            nn.Linear(784, 400),
            nn.Linear(400, latent_dim),
            nn.Linear(400, latent_dim),
        )
        self.decoder = nn.Sequential(nn.Linear(latent_dim, 400), nn.ReLU(), nn.Linear(400, 784), nn.Sigmoid())

    def terms(self, images):
        images = images.view(len(images), -1)
        hidden = F.relu(self.hidden(images))
        mean, logvar = self.mean(hidden), self.logvar(hidden)
        output = self.decoder(mean + torch.exp(0.5 * logvar) * torch.randn_like(mean))
        loss = F.binary_cross_entropy if self.bernoulli else F.mse_loss
        return loss(output, images, reduction="sum"), -0.5 * torch.sum(1 + logvar - mean.pow(2) - logvar.exp())


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Encoder(in_channels=1, out_channels=4), Decoder(in_channels=4, out_channels=1)

    def terms(self, images):
        posterior = DiagonalGaussianDistribution(self.encoder(images))
        return F.mse_loss(self.decoder(posterior.sample()), images, reduction="sum"), posterior.kl().sum()


RUNS = {
    "mlp-z2": dict(model=lambda: MLP(2, True), batch_size=50, lr=1e-3),
    "mlp-z20": dict(model=lambda: MLP(20, False), batch_size=128, lr=1e-3),
    "conv": dict(model=Conv, batch_size=32, lr=3e-4),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", choices=RUNS)
    parser.add_argument("--root", required=True)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--steps", type=int, default=None, help="stop after this many steps")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    run = RUNS[args.run]
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train, test = (datasets.MNIST(args.root, train=flag, transform=transforms.ToTensor()) for flag in (True, False))
    model = run["model"]().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=run["lr"])
    loader = DataLoader(train, run["batch_size"], shuffle=True)
    for epoch in range(1, args.epochs + 1):
        total, seen, start = 0.0, 0, time.perf_counter()
        for step, (images, _) in enumerate(loader, 1):
            images = images.to(device)
            optimizer.zero_grad()
            distortion, rate = model.terms(images)
            ((distortion + rate) / (len(images) if args.run == "conv" else 1)).backward()
            optimizer.step()
            total, seen = total + (distortion + rate).item(), seen + len(images)
            if step == args.steps:
                break
        seconds = time.perf_counter() - start
        record = {"run": args.run, "epoch": epoch, "images": seen, "train_loss": total / seen}
        record |= {"seconds": seconds, "images_per_second": seen / seconds}
        if args.steps is None:
            sums = torch.zeros(2, dtype=torch.float64)
            with torch.no_grad():
                for images, _ in DataLoader(test, 500):
                    sums += torch.tensor([term.item() for term in model.terms(images.to(device))])
            distortion, rate = (sums / len(test)).tolist()
            record |= {"test_distortion": distortion, "test_rate": rate, "test_loss": distortion + rate}
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
