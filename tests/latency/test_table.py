"""The latency table: round trip, look-up, tensor, and every kind of damage with its words."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fbnas.errors import InputError
from fbnas.latency.profiling import plan
from fbnas.latency.table import OVERHEAD, Entry, LatencyTable, Shape
from fbnas.space import SearchSpace

HEADER = {
    "device": "rpi4",
    "runtime": "onnxruntime",
    "precision": "int8",
    "threads": "1",
    "batch": "1",
    "noise_floor": "0.012",
    "space": "tiny",
}


@pytest.fixture
def space() -> SearchSpace:
    return SearchSpace.from_dict(
        {
            "name": "tiny",
            "resolution": 8,
            "input_channels": 1,
            "stem": {"channels": 4, "stride": 1},
            "stages": [{"channels": 4, "layers": 2, "stride": 1}],
            "head": 8,
            "blocks": ["k3_e1", "k5_e3", "skip"],
        }
    )


@pytest.fixture
def table(space: SearchSpace) -> LatencyTable:
    rows = enumerate(plan(space, 10, context=False), start=1)
    return LatencyTable(HEADER, [Entry(shape, i / 7, i / 8, i / 6, 9) for i, shape in rows])


@pytest.fixture
def saved(table: LatencyTable, tmp_path: Path) -> Path:
    table.save(tmp_path / "rpi4_int8.csv")
    return tmp_path / "rpi4_int8.csv"


def test_a_saved_table_reads_back_equal(table: LatencyTable, saved: Path) -> None:
    loaded = LatencyTable.load(saved)
    assert loaded == table
    assert (loaded.precision, loaded.threads, loaded.noise_floor) == ("int8", 1, 0.012)


def test_tensor_takes_the_overhead_of_a_run_from_each_row_and_adds_it_once(
    space: SearchSpace, table: LatencyTable
) -> None:
    latency_ms, base_ms = table.tensor(space)
    cost = {entry.shape: entry.latency_ms for entry in table.entries}
    overhead = cost[OVERHEAD]
    for layer in space.layers:
        for column, block in enumerate(space.blocks):
            expected = cost[Shape(block, 4, 4, 1, 8, 8)] - overhead
            assert latency_ms[layer.index, column].item() == pytest.approx(expected)
    fixed = sum(cost[s] for s in cost if s.block in ("stem", "head", "classifier"))
    assert base_ms == pytest.approx(fixed - 2 * overhead)
    assert latency_ms.dtype == torch.float64


def test_tensor_is_nan_where_a_block_is_not_offered(table: LatencyTable) -> None:
    content = {
        "resolution": 8,
        "stem": {"channels": 4, "stride": 1},
        "stages": [
            {"channels": 4, "layers": 1, "stride": 1},
            {"channels": 6, "layers": 1, "stride": 2},
        ],
        "head": 8,
        "blocks": ["k3_e1", "skip"],
        "skip_on_reduction": False,
    }
    space = SearchSpace.from_dict(content)
    rows = [Entry(shape, 1.0, 1.0, 1.0, 9) for shape in plan(space, 10, context=False)]
    latency_ms, _ = LatencyTable(HEADER, rows).tensor(space)
    assert (~latency_ms.isnan()).equal(space.offered)
    assert latency_ms.isnan().any()


def test_tensor_applies_the_correction(space: SearchSpace, table: LatencyTable) -> None:
    latency_ms, base_ms = table.tensor(space)
    header = {**HEADER, "correction_scale": "1.5", "correction_base_ms": "-0.25"}
    corrected, corrected_base_ms = LatencyTable(header, table.entries).tensor(space)
    assert torch.allclose(corrected, latency_ms * 1.5)
    assert corrected_base_ms == pytest.approx(base_ms * 1.5 - 0.25)


def test_a_missing_shape_is_refused_with_the_command_that_measures_it(
    space: SearchSpace, table: LatencyTable, saved: Path
) -> None:
    with pytest.raises(InputError) as refusal:
        table.lookup("k5_e6", 64, 64, 1, 14, 14, space="fbnet")
    assert str(refusal.value) == (
        "No latency for k5_e6 (64 -> 64, stride 1, 14x14) in rpi4_int8.csv, which holds "
        f"{len(table.entries)} rows for space tiny. Measure it: fbnas profile space=fbnet "
        f"device=local device.name=rpi4 device.precision=int8 table={saved}"
    )


def test_the_classifier_is_the_only_one_or_that_of_1000_classes(
    space: SearchSpace, table: LatencyTable
) -> None:
    def with_classes(*classes: int) -> LatencyTable:
        rows = [entry for entry in table.entries if entry.shape.block != "classifier"]
        shapes = [Shape("classifier", 8, n, 1, 8, 8) for n in classes]
        return LatencyTable(HEADER, [*rows, *(Entry(s, 9.0, 9.0, 9.0, 9) for s in shapes)])

    base_ms = with_classes(7).tensor(space)[1]
    assert with_classes(10, 1000).tensor(space)[1] == base_ms
    with pytest.raises(InputError, match=r"classifiers of \[2, 10\] classes; .* say which with"):
        with_classes(2, 10).tensor(space)
    # a space that is not shipped is named as a file
    words = r"No latency for classifier \(8 -> 5,.* space=tiny\.yaml .*classes=5 table="
    with pytest.raises(InputError, match=words):
        with_classes(10).tensor(space, classes=5)


def with_columns(table: LatencyTable, *columns: str) -> LatencyTable:
    """Energy 1, 2, ... mJ and peak memory 0.5, 1, ... MB, as far as asked for; no row's third."""
    values = {"energy_mj": 1.0, "peak_mb": 0.5}
    entries = [
        entry if i == 3 else replace(entry, **{c: i * values[c] for c in columns})
        for i, entry in enumerate(table.entries, start=1)
    ]
    return LatencyTable(HEADER, entries)


@pytest.mark.parametrize("columns", [("energy_mj",), ("peak_mb",), ("energy_mj", "peak_mb")])
def test_optional_columns_read_back_and_are_written_only_where_known(
    columns: tuple[str, ...], table: LatencyTable, saved: Path, tmp_path: Path
) -> None:
    path = tmp_path / "more.csv"
    more = with_columns(table, *columns)
    more.save(path)
    assert LatencyTable.load(path) == more
    assert LatencyTable.load(path) != table
    assert f"samples,{','.join(columns)}\n" in path.read_text()
    LatencyTable.load(path).save(tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_bytes() == path.read_bytes()
    LatencyTable.load(saved).save(tmp_path / "without.csv")
    assert (tmp_path / "without.csv").read_bytes() == saved.read_bytes()
    assert "energy" not in saved.read_text()


def test_energy_adds_up_and_peak_memory_is_the_most(
    space: SearchSpace, table: LatencyTable
) -> None:
    entries = with_columns(table, "energy_mj", "peak_mb").entries
    known = [entry for entry in entries if entry.shape != entries[2].shape]
    third = replace(entries[2], energy_mj=40.0, peak_mb=30.0)
    full = LatencyTable(HEADER, [third, *known])
    cost = {entry.shape: entry for entry in full.entries}
    for tensor, base, key, combine in (
        (*full.energy(space), "energy_mj", sum),
        (*full.peak(space), "peak_mb", max),
    ):
        for layer in space.layers:
            for column, block in enumerate(space.blocks):
                expected = getattr(cost[Shape(block, 4, 4, 1, 8, 8)], key)
                assert tensor[layer.index, column].item() == expected
        fixed = [e for e in full.entries if e.shape.block in ("stem", "head", "classifier")]
        assert base == combine(getattr(e, key) for e in fixed)  # the overhead plays no part
        assert tensor.dtype == torch.float64


def test_what_a_table_does_not_know_of_energy_and_memory(
    space: SearchSpace, table: LatencyTable
) -> None:
    with pytest.raises(InputError, match=r"no column energy_mj; .*with device=roofline"):
        table.energy(space)
    with pytest.raises(InputError, match=r"no column peak_mb; .*again with this fbnas"):
        table.peak(space)
    partly = with_columns(table, "energy_mj", "peak_mb")
    unknown = partly.entries[2]
    with pytest.raises(InputError, match=f"no energy_mj of {unknown.shape.block}"):
        partly.energy(space)
    identity = [
        replace(e, latency_ms=0.0, low_ms=0.0, high_ms=0.0, samples=0) if e is unknown else e
        for e in partly.entries
    ]
    column = space.blocks.index(unknown.shape.block)
    assert (LatencyTable(HEADER, identity).energy(space)[0][:, column] == 0).all()
    assert (LatencyTable(HEADER, identity).peak(space)[0][:, column] == 0).all()


@pytest.mark.parametrize(
    ("pattern", "replacement", "words"),
    [
        (r"(stem,.*),2.0,1.0\n", r"\1,fast,1.0\n", "line 12: energy_mj is 'fast'; .* of mJ, not n"),
        (r"(stem,.*),2.0,1.0\n", r"\1,2.0,-1\n", "line 12: peak_mb is '-1'; .*number of MB, not n"),
        (r"(stem,.*),1.0\n", r"\1\n", "line 12: found 11 fields in 'stem,.*expected 12 fields"),
        ("energy_mj,peak_mb", "peak_mb,energy_mj", "line 10: found 'block,.*expected the columns"),
        ("energy_mj", "energy", "line 10: found 'block,.*expected the columns"),
    ],
)
def test_damage_in_optional_columns_is_named_by_line(
    pattern: str, replacement: str, words: str, table: LatencyTable, tmp_path: Path
) -> None:
    path = tmp_path / "more.csv"
    with_columns(table, "energy_mj", "peak_mb").save(path)
    damaged = re.sub(pattern, replacement, path.read_text(), count=1)
    assert damaged != path.read_text()
    path.write_text(damaged)
    with pytest.raises(InputError, match=words) as refusal:
        LatencyTable.load(path)
    assert str(refusal.value).startswith(f"{path}, line ")


DAMAGE = {
    "no header": (
        r"(# .*\n)+",
        "",
        r"line 1: found no `# format: ...` line; expected `# format: 1`",
    ),
    "not a header line": (r"# device: rpi4", "# rpi4", r"line 2: found '# rpi4'; expected"),
    "other format": (r"# format: 1", "# format: 7", r"line 1: table format '7'; expected format 1"),
    "header twice": (r"# device: rpi4\n", r"\g<0>\g<0>", r"line 3: header device stands in line 2"),
    "no precision": (r"# precision: int8\n", "", r"has no `# precision: ...` line; expected fp32"),
    "threads": (
        r"threads: 1",
        "threads: two",
        r"line 5: header threads is 'two'; expected a whole",
    ),
    "noise": (r"noise_floor: .*", "noise_floor: -1", r"line 7: header noise_floor is '-1'"),
    "scale": (
        r"(# space.*\n)",
        r"\1# correction_scale: 0\n",
        r"line 9: header correction_scale is",
    ),
    "missing column": (
        r",stride,",
        ",",
        r"line 10: found 'block,in.*'; expected the columns block",
    ),
    "no columns": (
        r"\nblock(.|\n)*",
        "\n",
        r"line 10: found the end of the file; expected the col",
    ),
    "too few fields": (r"(stem,.*),9\n", r"\1\n", r"line 12: found 9 fields in 'stem,"),
    "not a number": (
        r"stem,1,4,1,8,8,[^,]*",
        "stem,1,4,1,8,8,fast",
        r"line 12: latency_ms is 'fast'",
    ),
    "negative": (
        r"stem,1,4,1,8,8,",
        "stem,1,4,1,8,8,-",
        r"line 12: .* expected a number of ms, not n",
    ),
    "nan": (r"stem,1,4,1,8,8,[^,]*", "stem,1,4,1,8,8,nan", r"line 12: latency_ms is 'nan'"),
    "no stride": (
        r"stem,1,4,1,",
        "stem,1,4,0,",
        r"line 12: stride is '0'; expected a whole number fr",
    ),
    "no block": (r"\nstem,", "\n,", r"line 12: block is ''; expected a block's name"),
    "samples": (r"(stem,.*),9\n", r"\1,-9\n", r"line 12: samples is '-9'; expected a whole number"),
    "interval": (
        r"stem,1,4,1,8,8,[^,]*",
        "stem,1,4,1,8,8,99",
        r"line 12: latency_ms is 99.0; expec",
    ),
    "row twice": (r"(stem,.*\n)", r"\1\1", r"line 13: stem \(1 -> 4, .* stands in line 12 too"),
    "row gone": (r"stem,.*\n", "", r"line 9: the header says rows: 7, the file holds 6"),
    "rows edited": (
        r"# rows: 7",
        "# rows: many",
        r"line 9: header rows is 'many'; expected the numb",
    ),
    "cut off": (r"1\.0,1\.0\Z|\d,9\n\Z", "", r"line 17: the file is cut off at 'classifier"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_with_file_line_and_the_way_out(damage: str, saved: Path) -> None:
    pattern, replacement, words = DAMAGE[damage]
    text = saved.read_text()
    damaged = re.sub(pattern, replacement, text, count=1)
    assert damaged != text
    saved.write_text(damaged)
    with pytest.raises(InputError, match=words) as refusal:
        LatencyTable.load(saved)
    assert str(refusal.value).startswith(f"{saved}, line ")
    assert "measure it again with fbnas profile" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_every_truncation_is_refused(saved: Path) -> None:
    content = saved.read_bytes()
    for length in range(len(content)):
        saved.write_bytes(content[:length])
        with pytest.raises(InputError):
            LatencyTable.load(saved)


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such latency table; write it with fbnas profile"):
        LatencyTable.load(tmp_path / "none.csv")
    with pytest.raises(InputError, match="is a folder; expected a latency table"):
        LatencyTable.load(tmp_path)
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not text"):
        LatencyTable.load(tmp_path / "binary.csv")
