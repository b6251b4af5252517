from dataclasses import dataclass

import pytest
import torch

from models.checks import check_images, check_multiple, check_options, check_pixels, check_positive, check_share, check_tokens


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


def test_tokens():
    check_tokens(torch.zeros(2, 5, dtype=torch.int64), 5)
    with pytest.raises(TypeError, match="token numbers must be integers, not torch.float32"):
        check_tokens(torch.zeros(2, 5), 5)
    with pytest.raises(ValueError, match="6 tokens, but the model has 5 positions: truncate the input"):
        check_tokens(torch.zeros(2, 6, dtype=torch.int64), 5)
    with pytest.raises(ValueError, match=r"token numbers must be \(B, S\), not \(6,\)"):
        check_tokens(torch.zeros(6, dtype=torch.int64), 9)
