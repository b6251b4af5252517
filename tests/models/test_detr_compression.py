"""N:M sparsity and channel pruning of every kind of the DETR family."""

import pytest
import torch

import nmforge as nf
from algo.count import count
from models import create_model
from tests.models.detr_reference import scene

KINDS = {
    "detr_tiny": {},
    "dab_detr_tiny": {},
    "deformable_detr_tiny": {},
    "h_deformable_detr_tiny": {"many_queries": 12},
}


def build(name, **options):
    torch.manual_seed(0)
    return create_model(name, queries=8, width=8, encoder_layers=1, decoder_layers=2, **KINDS[name], **options)


@pytest.mark.parametrize("name", KINDS)
def test_sparse_training_and_finalize(name):
    model = build(name, feataug="flip")
    nf.sparsify(model, "2:4", method="sr-ste")
    images, mask, targets = scene(classes=1)
    optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-4)
    for _ in range(2):
        optimizer.zero_grad()
        sum(model.losses(images, targets, mask).values()).backward()
        optimizer.step()
    masked = model.eval()(images, mask)
    nf.finalize(model)
    plain = model(images, mask)
    assert torch.allclose(plain.logits, masked.logits, atol=1e-5) and torch.allclose(plain.boxes, masked.boxes, atol=1e-5)
    rows = {row.layer: row for row in nf.sparsity_report(model)}
    assert all(row.violations == 0 for row in rows.values())
    sparse = [name for name, row in rows.items() if str(row.pattern) == "2:4"]
    assert {"backbone.layer4.1.conv2", "encoder.0.mlp.up", "decoder.1.cross_attention.value"} <= set(sparse)
    assert not any("class_head" in layer or "box_head" in layer for layer in sparse)  # output heads stay dense by default


def check_groups(name, graph):
    """The stream through the transformer meets sums with encodings, norms and heads; feed-forward layers and the backbone go."""
    kept = {group.name: group.kept for group in graph.groups}
    free = {layer for layer, reason in kept.items() if reason is None}
    assert {"backbone.conv1", "backbone.layer3.0.conv1", "encoder.0.mlp.up", "decoder.1.mlp.up"} <= free
    stem, why = ("project.0.0", "group_norm normalises over them") if "deformable" in name else \
        ("project", "combines them with a value that is not pruned")
    assert why in kept[stem] and "unflatten splits them" in kept["encoder.0.attention.value"]


@pytest.mark.parametrize("name", KINDS)
def test_channels_are_pruned_while_it_trains(name):
    model = build(name).train()
    images, mask, targets = scene(classes=1, padded=False)
    before = count(model, images)
    pruner = nf.FisherPruner(model, images, target=0.98, interval=1, units=16, check=False)
    check_groups(name, pruner.graph)
    for _ in range(20):
        model.zero_grad()
        sum(model.losses(images, targets).values()).backward()
        pruner.step()
        if pruner.done:
            break
    with torch.no_grad():
        masked = model.eval()(images)
        pruner.finish()
        plain = model(images)
    after = count(model, images)
    assert pruner.done and after.macs <= 0.981 * before.macs and after.parameters < before.parameters
    assert torch.allclose(plain.logits, masked.logits, atol=1e-4) and torch.allclose(plain.boxes, masked.boxes, atol=1e-4)
