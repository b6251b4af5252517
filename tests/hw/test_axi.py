import re

import pytest

from hw.axi import AXI4LiteSignature, AXI4ReadSignature, AXI4WriteSignature, axi_ports


@pytest.mark.parametrize("kind", [AXI4ReadSignature, AXI4WriteSignature])
def test_data_signatures(kind):
    signature = kind(32)
    assert signature == kind(32)
    assert signature != kind(64)
    assert repr(signature) == f"{kind.__name__}(32)"
    with pytest.raises(ValueError, match=r"^data_bytes must be a power of two in 1\.\.128, not 12$"):
        kind(12)
    with pytest.raises(TypeError, match=r"^data_bytes must be an int, not '8'$"):
        kind("8")


def test_lite_signature():
    assert AXI4LiteSignature(12) == AXI4LiteSignature(12)
    assert AXI4LiteSignature(12) != AXI4LiteSignature(10)
    assert repr(AXI4LiteSignature(12)) == "AXI4LiteSignature(12)"
    with pytest.raises(ValueError, match=re.escape("addr_width must be in 3..32, not 2")):
        AXI4LiteSignature(2)
    with pytest.raises(TypeError, match=re.escape("addr_width must be an int, not None")):
        AXI4LiteSignature(None)


def test_ports():
    interface = AXI4ReadSignature(8).create()
    ports = axi_ports("m_axi", interface)
    assert ports["m_axi_araddr"][0] is interface.araddr
    assert len(ports) == 13
