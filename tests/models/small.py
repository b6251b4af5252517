"""A few real steps of training on patterns that a network must be able to learn by heart."""

import torch
from torch.nn import functional as F

from algo.data import mnist5k


def digits(count):
    """The first digits of MNIST-5k, scaled: (count, 1, 28, 28), labels."""
    train, _ = mnist5k()
    return (train.images[:count].float() / 255 - 0.1307) / 0.3081, train.labels[:count]


def overfit(model, *, count=32, steps=40, lr=2e-3, before_step=None):
    """Train on a few digits; accuracy on them in eval mode."""
    x, y = digits(count)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for step in range(steps):
        if before_step is not None:
            before_step(model, step, steps)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        for _ in range(30):  # the averages of batch norm lag behind so few steps
            model(x)
        return float((model.eval()(x).argmax(1) == y).float().mean())


def fisher_prunes(model, x, *, target=0.7):
    """Prune by Fisher importance until a share of the MACs is left: the smaller network computes what the gated one did."""
    from algo.count import count
    from algo.fisher import FisherPruner

    before = count(model, x).macs
    pruner = FisherPruner(model, x, target=target, interval=1, units=2)
    for _ in range(200):
        model.zero_grad()
        F.cross_entropy(model(x), torch.arange(len(x))).backward()
        pruner.step()
        if pruner.done:
            break
    with torch.no_grad():
        gated = model(x)
        pruner.finish()
        smaller = model(x)
    assert pruner.done and count(model, x).macs < 0.8 * before
    assert torch.allclose(gated, smaller, rtol=1e-3, atol=1e-4 * float(gated.abs().max()))
