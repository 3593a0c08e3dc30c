"""Train the three networks of the quality benchmark, and write them as safetensors.

    python -m benchmarks.train.quality

needs scikit-learn and pillow; each takes one to four minutes of one core. Give names to train only those.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.quality.networks import EpsilonNetwork, PatchNetwork, VelocityNetwork, ddpm_table
from benchmarks.train.digits import digits_data, fit

WEIGHTS = Path(__file__).parents[1] / "quality" / "weights"


def digits_vp() -> dict[str, Tensor]:
    """Noise predictions of digits by DDPM's loss, ``E |eps - eps(x_t, t)|^2`` over integer timesteps."""
    data, table, network = digits_data(), ddpm_table().float(), EpsilonNetwork()

    def loss() -> Tensor:
        t = torch.randint(len(table), (256,))
        abar = table[t][:, None, None, None]
        clean = data[torch.randint(len(data), (256,))]
        noise = torch.randn_like(clean)
        return (network(abar.sqrt() * clean + (1 - abar).sqrt() * noise, t) - noise).square().mean()

    return fit(network, loss, 5_000, 1e-3, "digits_vp").state_dict()


def patches() -> dict[str, Tensor]:
    """Crops of scikit-learn's two photographs, mirrored at random, by EDM's weighted loss."""
    from sklearn.datasets import load_sample_images

    photographs = [
        torch.from_numpy(image).permute(2, 0, 1).float() / 127.5 - 1 for image in load_sample_images().images
    ]
    crops = torch.cat([image.unfold(1, 16, 3).unfold(2, 16, 3).flatten(1, 2).transpose(0, 1) for image in photographs])
    network = PatchNetwork(sigma_data=float(crops.std()))
    sd = network.sigma_data

    def loss() -> Tensor:
        clean = crops[torch.randint(len(crops), (64,))]
        clean = torch.where((torch.rand(64) < 0.5)[:, None, None, None], clean, clean.flip(3))
        s = (-1.2 + 1.8 * torch.randn(64)).exp().clamp(network.sigma_min, network.sigma_max)
        wide = s[:, None, None, None]
        total = (wide.square() + sd**2).sqrt()
        z = clean + wide * torch.randn_like(clean)
        target = (clean - (sd / total) ** 2 * z) * total / (wide * sd)
        return (network(z / total, s.log() / 4) - target).square().mean()

    kept = fit(network, loss, 2_500, 2e-3, "patches").state_dict()
    return {**kept, "sigma_data": torch.tensor(sd)}


def flow() -> dict[str, Tensor]:
    """The velocity of a ring of six modes in the plane, by the flow-matching loss over uniform times."""
    network = VelocityNetwork()

    def loss() -> Tensor:
        angle = torch.randint(6, (512,)) * (math.pi / 3)
        clean = torch.stack([angle.cos(), angle.sin()], 1) + 0.12 * torch.randn(512, 2)
        noise, t = torch.randn(512, 2), torch.rand(512)
        x = torch.lerp(clean, noise, t[:, None])
        return (network(x, t) - (noise - clean)).square().mean()

    return fit(network, loss, 12_000, 2e-3, "flow").state_dict()


TRAINERS = {"digits_vp": digits_vp, "patches": patches, "flow": flow}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"{', '.join(TRAINERS)}; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in args.names or TRAINERS:
        torch.manual_seed(args.seed)
        tensors = {
            key: tensor if key == "sigma_data" else tensor.half().contiguous()
            for key, tensor in TRAINERS[name]().items()
        }
        path = WEIGHTS / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, metadata={"seed": str(args.seed)})
        print(f"wrote {path.name}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
