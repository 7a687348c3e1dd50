"""Images that are not natural, in the ways in which reconstructions fail: what an
anomaly score should tell from photographs.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from gipip.attacks.objectives import total_variation
from gipip.priors.base import Images, Seed, validated


@validated
def anomalies(images: Images, seed: Seed = 0) -> dict[str, Images]:
    """Four kinds of anomalous images in [0, 1], as many of each as there are `images`.

    "noise": uniform; "shuffled": the image's pixels in random order; "blurred":
    Gaussian, σ = 1.5 pixels; "TV-smoothed": flattened by total-variation denoising, as
    too large a λ_TV does.
    """
    from torchvision.transforms.functional import gaussian_blur  # slow to import

    generator = torch.Generator().manual_seed(seed)
    pixels = images.flatten(2)
    orders = torch.rand(len(images), 1, pixels.shape[2], generator=generator).argsort(dim=2)
    return {
        "noise": torch.rand(images.shape, generator=generator),
        "shuffled": pixels.gather(2, orders.expand_as(pixels)).view_as(images),
        "blurred": gaussian_blur(images, kernel_size=7, sigma=1.5),
        "TV-smoothed": _smooth(images),
    }


def _smooth(images: Images) -> Images:
    """Total-variation denoising: approximately argmin_x mean (x − images)² + 0.1·TV(x),
    in 100 steps of Adam, in [0, 1].
    """
    x = images.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        ((x - images).square().mean() + 0.1 * total_variation(x)).backward()
        optimizer.step()
    return x.detach().clamp(0, 1)


def auroc(natural: Float[Tensor, "m"], anomalous: Float[Tensor, "n"]) -> float:
    """Probability that a random anomalous image scores higher than a random natural
    one: 1 is perfect, 0.5 is chance.
    """
    from scipy.stats import mannwhitneyu  # slow to import

    higher, lower = anomalous.double(), natural.double()
    wins = mannwhitneyu(higher, lower, method="asymptotic").statistic
    return float(wins) / (len(natural) * len(anomalous))
