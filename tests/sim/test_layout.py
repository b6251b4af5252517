"""Order of a model's variables: like instances side by side, nothing lost, types in their places."""

from sim.layout import arrange


def _header(*names: str, kind: str = "IData/*31:0*/") -> str:
    return "\n".join(["struct {", *(f"    {kind} {name};" for name in names), "};"])


def _names(header: str) -> list[str]:
    return [line.split()[1].rstrip(";") for line in header.split("\n")[1:-1]]


def test_neighbours_lie_side_by_side() -> None:
    names = [f"lane{lane}__DOT__mac{mac}__DOT__{name}" for lane in range(2) for mac in range(8) for name in ("sum", "total")]
    found = _names(arrange(_header(*names)))
    assert sorted(found) == sorted(names)
    byte_order = [0, 4, 1, 5, 2, 6, 3, 7]
    assert found[:8] == [f"lane0__DOT__mac{mac}__DOT__sum" for mac in byte_order]
    assert found[8:16] == [f"lane0__DOT__mac{mac}__DOT__total" for mac in byte_order]
    assert found[16:24] == [f"lane1__DOT__mac{mac}__DOT__sum" for mac in byte_order]


def test_delayed_and_renamed_variables_keep_company() -> None:
    names = ["__Vdly__row1__DOT__mx__0249", "row0__DOT__mx", "__Vdly__row0__DOT__mx", "row1__DOT__mx__0249"]
    assert _names(arrange(_header(*names))) == [names[1], names[3], names[2], names[0]]


def test_elements_of_an_array_of_ports() -> None:
    names = [f"shadow___05F{lane}___05F{row}" for lane in (1, 0) for row in (1, 0)]
    assert _names(arrange(_header(*names))) == [f"shadow___05F{lane}___05F{row}" for lane in (0, 1) for row in (0, 1)]


def test_types_keep_their_places_and_all_else_its_line() -> None:
    lines = ["    VL_IN8(clk,0,0);", "    CData/*0:0*/ b;", "    IData/*9:0*/ d;", "    CData/*7:0*/ a;", "    IData/*9:0*/ c;",
             "    VlUnpacked<IData/*9:0*/, 4> m;", "    Vtop__Syms* vlSymsp;"]
    arranged = arrange("\n".join(lines)).split("\n")
    assert arranged == [lines[0], lines[3], lines[4], lines[1], lines[2], *lines[5:]]
