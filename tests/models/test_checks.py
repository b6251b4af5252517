from dataclasses import dataclass

import pytest
import torch

from models.checks import (
    check_entries,
    check_images,
    check_labels,
    check_mask,
    check_multiple,
    check_numbers,
    check_options,
    check_pixels,
    check_positive,
    check_share,
    check_tokens,
)


@dataclass(frozen=True)
class Sizes:
    width: int = 4
    heads: int | None = None
    stages: tuple[int, ...] = (1, 2)
    rate: float = 0.0
    name: str = ""


def test_positive():
    for fine in (Sizes(), Sizes(heads=2), Sizes(rate=-1.0)):
        check_positive(fine)
    check_positive(Sizes(width=0, heads=0), zero=("width", "heads"))
    with pytest.raises(ValueError, match="width must be an integer >= 0, not -1"):
        check_positive(Sizes(width=-1), zero=("width",))
    for sizes, message in (
        (Sizes(width=0), "width must be an integer >= 1, not 0"), (Sizes(heads=-1), "heads must be an integer >= 1, not -1"),
        (Sizes(width=2.0), "width must be an integer >= 1, not 2.0"), (Sizes(stages=()), "stages must not be empty"),
        (Sizes(stages=(1, 0)), r"stages must hold integers >= 1, not \(1, 0\)"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            check_positive(sizes)


def test_share_and_multiple():
    check_share(Sizes(rate=0.5), "rate")
    for rate in (1.0, -0.1):
        with pytest.raises(ValueError, match=rf"rate must be in \[0, 1\), not {rate}"):
            check_share(Sizes(rate=rate), "rate")
    check_multiple(Sizes(heads=2), "width", "heads")
    with pytest.raises(ValueError, match="width must be a multiple of heads, not 4 with heads = 3"):
        check_multiple(Sizes(heads=3), "width", "heads")


def test_options():
    check_options("net", ["a"], ("a", "b"))
    with pytest.raises(ValueError, match="net has no option 'c': it has a, b"):
        check_options("net", ["c", "a"], ("a", "b"))


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 1, 8, 8), (2, 3, 8, 9), (2, 3, 8, 8, 1)])
def test_images(shape):
    with pytest.raises(ValueError, match=r"images must be \(B, 3, 8, 8\), not \(" + ", ".join(map(str, shape))):
        check_images(torch.zeros(shape), 3, 8)


def test_images_of_any_size():
    check_images(torch.zeros(2, 3, 8, 9), 3)
    check_images(torch.zeros(2, 3, 8, 8), 3, 8)
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\), not \(2, 4, 8, 8\)"):
        check_images(torch.zeros(2, 4, 8, 8), 3)


def test_images_of_whole_numbers():
    with pytest.raises(TypeError, match="images must be floating point, normalised as the network expects, not torch.uint8"):
        check_images(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_pixels(value):
    images = torch.zeros(3, 3, 8, 9)
    check_pixels(images)
    check_pixels(images[:0])
    images[1, 2, 3, 4] = value
    with pytest.raises(ValueError, match="^image 1 has a pixel that is not finite$"):
        check_pixels(images)


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 3, 0, 8), (2, 3, 8, 0)])
def test_no_image_at_all(shape):
    with pytest.raises(ValueError, match=r"^maps must be at least one, of at least one pixel, not \(\d"):
        check_images(torch.zeros(shape), 3, name="maps")


@pytest.mark.parametrize("images", [[torch.zeros(3, 8, 8)], None, "images"])
def test_images_are_a_tensor(images):
    kind = type(images).__name__
    with pytest.raises(TypeError, match=f"^images must be a tensor, not {kind}: pad_images makes a batch of several$"):
        check_images(images, 3)


def test_tokens():
    for kind in (torch.int64, torch.int32):
        check_tokens(torch.tensor([[0, 9, 1, 2, 3]], dtype=kind), 5, 10)
    check_tokens(torch.full((2, 5), 99, device="meta"), 5, 10)  # nothing to look at
    with pytest.raises(TypeError, match="token numbers must be a tensor, not list"):
        check_tokens([[1, 2]], 5, 10)
    for kind in (torch.float32, torch.bool, torch.int8):
        with pytest.raises(TypeError, match=f"token numbers must be integers, int64 or int32, not {kind}"):
            check_tokens(torch.zeros(2, 5, dtype=kind), 5, 10)
    with pytest.raises(ValueError, match="6 tokens, but the model has 5 positions: truncate the input"):
        check_tokens(torch.zeros(2, 6, dtype=torch.int64), 5, 10)
    for shape in ((6,), (0, 6), (2, 0), (1, 2, 3)):
        with pytest.raises(ValueError, match=r"token numbers must be \(B, S\), at least one of a sequence, not \("):
            check_tokens(torch.zeros(shape, dtype=torch.int64), 9, 10)


@pytest.mark.parametrize("wrong", [-1, 10, 2**40])
def test_numbers_out_of_range(wrong):
    numbers = torch.tensor([[0, 9], [3, wrong], [wrong, 1]])
    with pytest.raises(ValueError, match=rf"^kinds must be in 0 to 9, not {wrong} \(place 1 of sequence 1\)$"):
        check_numbers(numbers, 10, "kinds")


def test_mask_has_an_entry_a_token():
    check_mask(torch.ones(2, 5), torch.zeros(2, 5, 8))
    for shape in ((2, 4), (1, 5), (5,)):
        with pytest.raises(ValueError, match=r"the attention mask must be \(2, 5\), one a token, not \("):
            check_mask(torch.ones(shape), torch.zeros(2, 5))
    with pytest.raises(TypeError, match="the attention mask must be a tensor, not NoneType"):
        check_mask(None, torch.zeros(2, 5))


@dataclass
class Entry:
    labels: object


def test_entries():
    check_entries([Entry(1), Entry(2)], Entry, images=2, name="targets")
    check_entries((), Entry, images=0, name="targets")
    for wrong, message in (
        (None, "targets must be a list with one Entry an image, not NoneType"),
        (Entry(1), "targets must be a list with one Entry an image, not Entry"),
        ([Entry(1), {"labels": 1}], r"targets must hold one Entry an image, not dict \(image 1\)"),
    ):
        with pytest.raises(TypeError, match=message):
            check_entries(wrong, Entry, images=2, name="targets")
    with pytest.raises(ValueError, match="2 images need as many targets, not 1"):
        check_entries([Entry(1)], Entry, images=2, name="targets")


def test_labels():
    boxes = torch.zeros(2, 4)
    check_labels(torch.tensor([0, 2]), boxes, classes=3, image=1, name="boxes")
    check_labels(torch.zeros(0, dtype=torch.int64), boxes[:0], classes=3, image=1, name="boxes")
    for labels, kind, message in (
        ([0, 1], TypeError, "labels of image 1 must be a tensor, not list"),
        (torch.zeros(2), TypeError, "labels of image 1 must be int64, not torch.float32"),
        (torch.tensor([0]), ValueError, r"image 1 has labels \(1,\) for boxes \(2, 4\): one for each"),
        (torch.tensor([[0, 1]]), ValueError, r"image 1 has labels \(1, 2\) for boxes \(2, 4\)"),
        (torch.tensor([0, 3]), ValueError, r"labels of image 1 must be in 0 to 2, not \[0, 3\]"),
        (torch.tensor([-1, 0]), ValueError, r"labels of image 1 must be in 0 to 2, not \[-1, 0\]"),
    ):
        with pytest.raises(kind, match=message):
            check_labels(labels, boxes, classes=3, image=1, name="boxes")
