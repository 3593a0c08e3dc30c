"""Train the digits denoiser that fastsched ships, and write it as safetensors.

    python benchmarks/train/digits.py

needs scikit-learn and takes two to four minutes of one core. It prints the denoising error beside that of the best
linear denoiser and that of the data set's own posterior mean (which a network that memorised the data would reach).

3,000 steps were chosen by the error on 360 digits held out (``--held-out 360``), against 1,500 and 6,000: at sigma
0.05, 0.1, 0.5 and 1 it is 3.0e-3, 1.0e-2, 1.1e-1 and 2.3e-1 of the data's variance after 1,500 steps, 2.9e-3, 9.9e-3,
9.1e-2 and 2.1e-1 after 3,000, and 3.4e-3, 1.1e-2, 8.6e-2 and 2.0e-1 after 6,000, where low noise levels overfit.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from fastsched.denoisers.digits import DigitsNetwork
from fastsched.denoisers.oracles import Empirical, GaussianMixture

ASSET = Path(__file__).parents[2] / "fastsched" / "denoisers" / "assets" / "digits.safetensors"
Network = TypeVar("Network", bound=nn.Module)


def digits_data() -> Tensor:
    """The 1,797 digits of scikit-learn, [1797, 1, 8, 8] in [-1, 1]."""
    from sklearn.datasets import load_digits

    pixels, _ = load_digits(return_X_y=True)
    return torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 8 - 1


def preconditioned(network: DigitsNetwork, z: Tensor, s: Tensor) -> Tensor:
    """The denoiser ``D(z; s)`` of the raw network, by EDM's preconditioning; z [B, 1, 8, 8], s [B]."""
    level, sd = s[:, None, None, None], network.sigma_data
    total = (level**2 + sd**2).sqrt()
    return (sd / total) ** 2 * z + level * sd / total * network(z / total, s.log() / 4)


def fit(
    network: Network,
    loss: Callable[[], Tensor],
    iterations: int,
    rate: float,
    name: str,
    *,
    ema: float = 0.998,
    weight_decay: float = 0.01,
) -> Network:
    """AdamW with warm-up and cosine decay; returns the exponential moving average of the weights."""
    average = copy.deepcopy(network).requires_grad_(False)
    optimiser = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda i: min(1, (i + 1) / 200) * 0.5 * (1 + math.cos(math.pi * i / iterations))
    )
    bar = tqdm(range(iterations), desc=name, unit="step", mininterval=5)
    running = 0.0
    for i in bar:
        value = loss()
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        optimiser.step()
        schedule.step()
        decay = min(ema, (i + 1) / (i + 10))
        with torch.no_grad():
            for kept, new in zip(average.parameters(), network.parameters(), strict=True):
                kept.lerp_(new, 1 - decay)
        running += (value.item() - running) * max(0.01, 1 / (i + 1))
        bar.set_postfix(loss=f"{running:.4f}", refresh=False)
    return average.eval()


def train(data: Tensor, args: argparse.Namespace) -> DigitsNetwork:
    """The digits network, by EDM's weighted loss."""
    network = DigitsNetwork(sigma_data=float(data.std()))

    def loss() -> Tensor:
        clean = data[torch.randint(len(data), (args.batch,))]
        s = (args.log_mean + args.log_std * torch.randn(args.batch)).exp()
        s = s.clamp(network.sigma_min, network.sigma_max)
        z = clean + s[:, None, None, None] * torch.randn_like(clean)
        weight = (s**2 + network.sigma_data**2) / (s * network.sigma_data) ** 2
        return (weight * (preconditioned(network, z, s) - clean).square().mean((1, 2, 3))).mean()

    return fit(network, loss, args.iterations, args.lr, "training", ema=args.ema, weight_decay=args.weight_decay)


@torch.no_grad()
def report(network: DigitsNetwork, trained: Tensor, data: Tensor, title: str) -> None:
    """Print the mean squared denoising error on ``data`` at a few levels, divided by the data's variance.

    Beside it are the errors of the Gaussian fitted to ``trained`` and of the exact posterior over ``trained``.
    """
    flat = trained.flatten(1).double()
    linear = GaussianMixture(torch.ones(1), flat.mean(0)[None], torch.cov(flat.T)[None])
    posterior = Empirical(trained.double())
    print(f"{title}\n{'sigma':>8} {'network':>9} {'linear':>9} {'data set':>9}")
    for s in (0.002, 0.01, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 20.0, 80.0):
        z = data + s * torch.randn_like(data)
        ours = preconditioned(network, z, torch.full((len(z),), s))
        fitted = linear.denoise(z.flatten(1).double(), s).reshape(z.shape)
        exact = posterior.denoise(z.double(), s)
        errors = [float((guess - data).square().mean()) for guess in (ours, fitted, exact)]
        print(f"{s:8g} " + " ".join(f"{error / network.sigma_data**2:9.2e}" for error in errors))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ASSET, help="where to write the weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=3_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate; cosine decay to 0")
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--ema", type=float, default=0.999, help="decay of the averaged weights")
    parser.add_argument("--log-mean", type=float, default=-1.0, help="mean of ln sigma in training")
    parser.add_argument("--log-std", type=float, default=1.8, help="standard deviation of ln sigma in training")
    parser.add_argument("--held-out", type=int, default=0, help="digits kept from training, to report on")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    data = digits_data()
    data = data[torch.randperm(len(data))]
    kept, held = data[args.held_out :], data[: args.held_out]
    network = train(kept, args)
    tensors = {name: tensor.half().contiguous() for name, tensor in network.state_dict().items()}
    tensors["sigma_data"] = torch.tensor(network.sigma_data)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, args.output, metadata={"seed": str(args.seed), "iterations": str(args.iterations)})
    print(f"wrote {args.output.name}: {args.output.stat().st_size / 1e6:.2f} MB")
    report(network, kept, kept, "Mean squared error over the data's variance, digits trained on")
    if len(held):
        report(network, kept, held, "Mean squared error over the data's variance, digits held out")


if __name__ == "__main__":
    main()
