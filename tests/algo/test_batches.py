import torch

from algo.batches import LazyImages, collate_texts, image_batches, shifted, text_batches, walk


def test_walk_goes_through_everything_before_it_repeats() -> None:
    seen = [walk(10, 4, epoch, 3) for epoch in range(5)]
    assert sorted(sum(seen, [])) == sorted(list(range(10)) * 2)
    assert seen[0] == walk(10, 4, 0, 3) != walk(10, 4, 0, 4)


def test_texts_of_like_length_go_together() -> None:
    ids = [[1] * (1 + number % 7) for number in range(20)]
    epoch = text_batches(ids, list(range(20)), size=None, batch_size=5, seed=1)
    first, again, second = epoch(0), epoch(0), epoch(1)
    assert sorted(torch.cat([batch.labels for batch in first]).tolist()) == list(range(20))
    assert all(torch.equal(a.labels, b.labels) for a, b in zip(first, again, strict=True))
    assert any(not torch.equal(a.labels, b.labels) for a, b in zip(first, second, strict=True))
    assert all(batch.ids.shape == batch.mask.shape for batch in first)
    assert sum(int((batch.mask == 0).sum()) for batch in first) < 20
    assert len(text_batches(ids, list(range(20)), size=7, batch_size=5, seed=1)(0)) == 2


def test_padding() -> None:
    batch = collate_texts([[3, 4, 5], [6]], [1, 0], [1, 0])
    assert batch.ids.tolist() == [[6, 0, 0], [3, 4, 5]] and batch.mask.tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch.labels.tolist() == [0, 1]


def test_images_in_memory() -> None:
    images, labels = torch.arange(12.0).view(12, 1, 1, 1).expand(12, 1, 4, 4), torch.arange(12)
    epoch = image_batches(images, labels, size=8, batch_size=3, seed=0)(0)
    assert [len(batch.labels) for batch in epoch] == [3, 3, 2]
    assert all(torch.equal(batch.pixels[:, 0, 0, 0].long(), batch.labels) for batch in epoch)
    moved = image_batches(images, labels, size=8, batch_size=3, seed=0, augment=1)
    assert torch.equal(moved(0)[0].pixels, moved(0)[0].pixels) and moved(0)[0].pixels.shape == (3, 1, 4, 4)


def test_shifts_keep_the_image() -> None:
    image = torch.zeros(64, 2, 5, 5)
    image[:, :, 2, 2] = 1
    moved = shifted(image, 1, torch.Generator().manual_seed(0))
    assert torch.equal(moved.sum((2, 3)), torch.ones(64, 2)) and moved[:, :, 1:4, 1:4].sum() == 128
    assert {tuple(place) for place in moved[:, 0].nonzero()[:, 1:].tolist()} == {(r, c) for r in (1, 2, 3) for c in (1, 2, 3)}


def test_lazy_images() -> None:
    loaded = []

    def load(place: int) -> torch.Tensor:
        loaded.append(place)
        return torch.full((1, 2, 2), float(place))

    lazy = LazyImages(load, [10, 11, 12, 13, 14], [4, 0, 2, 1], batch_size=3, workers=2)
    assert len(lazy) == 2 and loaded == []
    assert lazy[1].labels.tolist() == [11] and loaded == [1]
    assert lazy[0].pixels[:, 0, 0, 0].tolist() == [4.0, 0.0, 2.0]
    rows, count = lazy.part(0, 1, 2)
    assert (rows.labels.tolist(), count) == ([10], 3)
    assert [len(batch.labels) for batch in lazy[:]] == [3, 1]
