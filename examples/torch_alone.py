"""The smallest run, with PyTorch alone and no download: python examples/torch_alone.py"""

import torch

import zo_kernels as zo


def main(steps: int = 3000) -> float:
    """Teach a small network four classes; returns its accuracy."""
    torch.manual_seed(0)
    x = torch.randn(512, 64)
    labels = (x @ torch.randn(64, 4)).argmax(1)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 4)).eval()
    opt = zo.MeZO(model, lr=3e-3, eps=1e-3)
    for _ in range(steps):
        batch = torch.randint(512, (64,))  # drawn outside of the closure, which a step calls twice
        opt.step(lambda batch=batch: torch.nn.functional.cross_entropy(model(x[batch]), labels[batch]))
    return (model(x).argmax(1) == labels).float().mean().item()


if __name__ == "__main__":
    print(main())
