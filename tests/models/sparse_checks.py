"""What every family must go through: N:M sparse training and Fisher pruning, at a small size."""

import torch

from algo.fisher import FisherPruner
from algo.sparsify import finalize, sparsify, sparsity_report


def check_nm_training(model, loss, *, pattern="2:4", minimum):
    """One step of SR-STE; then the weights obey the pattern, in at least ``minimum`` layers."""
    chosen = sparsify(model.train(), pattern, method="sr-ste")
    assert len(chosen) >= minimum
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss(model).backward()
    optimizer.step()
    finalize(model)
    rows = [row for row in sparsity_report(model) if row.pattern is not None]
    assert {row.layer for row in rows} == set(chosen) and not any(row.violations for row in rows)
    # groups at the end of a row may be shorter than four, and may be full
    assert sum(row.nonzeros for row in rows) < 0.52 * sum(torch.Size(row.shape).numel() for row in rows)


def check_fisher(model, images, loss, *, target, parts):
    """Prune to a fraction of the MACs; the groups pruned from are in all of ``parts``, and the smaller network still trains."""
    before = sum(parameter.numel() for parameter in model.parameters())
    pruner = FisherPruner(model.train(), images, target=target, interval=1, units=8)
    while not pruner.done:
        loss(model).backward()
        pruner.step()
    pruner.finish()
    names = {pruned.group for pruned in pruner.history}
    prunable = {group.name for group in pruner.graph.prunable}
    assert names <= prunable
    for part in parts:
        assert any(name.startswith(part) for name in prunable), part
    assert sum(parameter.numel() for parameter in model.parameters()) < before
    loss(model).backward()
    return pruner.graph
