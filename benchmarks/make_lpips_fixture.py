"""Write tests/lpips_fixture.npz: what the original LPIPS package answers, for test_losses.py to compare with.

    pip install lpips==0.1.4 --no-deps
    python benchmarks/make_lpips_fixture.py

torchvision, scipy and tqdm, which the package imports, are not needed: the package gets our trunks with seeded
random weights, and uses nothing else of them. It runs in float64, so the file holds the exact answer.
"""
import sys
import types
from pathlib import Path

import numpy as np
import torch
from torch import nn

TOP = Path(__file__).parents[1]
sys.path.insert(0, str(TOP))
import losses  # noqa: E402
from data import UserError, run_program  # noqa: E402

FIXTURE = TOP / "tests" / "lpips_fixture.npz"
SIZES = {"vgg": 32, "alex": 64}  # large enough for the deepest tap
# At a ReLU's kink (a max-pooling's tie) the gradient jumps, and fp32 rounding would decide to which side. The
# seeds are such that no feature of the pictures is that close to one.
SEEDS = {"vgg": 33, "alex": 0}


def seeded_trunk(net):
    """Random weights that keep the signal's size; with torch's own it fades until only epsilons are compared."""
    torch.manual_seed(SEEDS[net])
    trunk = losses.make_trunk(net)
    for layer in trunk:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.normal_(layer.bias, std=.1)
    return trunk


def pictures(net):
    """Two pairs of pictures in [0, 1], of fine noise and of large patches: 2 x (2, 3, S, S)."""
    random = np.random.RandomState(SEEDS[net])  # this generator's numbers are promised never to change
    x = random.rand(2, 3, SIZES[net], SIZES[net])
    y = np.kron(random.rand(2, 3, 4, 4), np.ones((SIZES[net] // 4, SIZES[net] // 4)))
    return torch.from_numpy(x).float(), torch.from_numpy(y).float()


def statistics(trunk):
    """Mean absolute weight and bias of every convolution: other random numbers show here first."""
    return np.array([p.detach().double().abs().mean().item() for p in trunk.parameters()])


def original_package(trunk):
    """The module lpips, with trunk(net) for its pretrained networks."""
    def pretrained(net):
        return lambda pretrained: types.SimpleNamespace(features=trunk(net))
    stubs = {"torchvision": {"models": types.SimpleNamespace(vgg16=pretrained("vgg"), alexnet=pretrained("alex"))},
             "scipy": {}, "scipy.ndimage": {"zoom": None}, "tqdm": {"tqdm": None}}
    for name, content in stubs.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(content)
    try:
        import lpips  # only now that it finds the stubs
    except ModuleNotFoundError:
        raise UserError("the original package is missing: pip install lpips==0.1.4 --no-deps") from None
    finally:
        for name in stubs:
            del sys.modules[name]  # others may want the real ones
    return lpips


def main():
    lpips = original_package(seeded_trunk)
    found = {}
    for net in SIZES:
        original = lpips.LPIPS(net=net, verbose=False).double()
        x, y = (t.double() for t in pictures(net))
        x.requires_grad_()
        value = original(x, y, normalize=True)[:, 0, 0, 0]                            # (2,)
        value.sum().backward()
        found.update({f"{net}_value": value.detach().numpy(), f"{net}_gradient": x.grad.float().numpy(),
                      f"{net}_statistics": statistics(seeded_trunk(net))})
        print(net, value.tolist(), x.grad.abs().max().item())
    np.savez_compressed(FIXTURE, **found)


if __name__ == "__main__":
    run_program(main)
