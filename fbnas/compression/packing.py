"""A network's tensors in as few bytes as they need, read back bit for bit.

What a tensor is is read from its values, and it is stored in the smallest of five forms:

    dense          its bytes as they are
    shared         a codebook of the values that occur, and coded indices into it
    sparse         coded relative positions of what is not zero, and its values as they are
    sparse_shared  coded relative positions, a codebook, and coded indices
    grid           a scale per channel and coded levels, its multiples: weights trained for few bits

Relative positions are those of Han et al. 2016 (arXiv 1510.00149, section 2): the zeros before each
weight in a fixed number of bits, with filler zeros where more come. Here the largest number of so
many bits is the filler: that many zeros and no weight, which needs no index. The number of bits, 1
to 8, and whether rows or columns are gone through, are those that give the fewest bytes. Indices
and positions are coded by `coding`: Huffman's code as in the paper's section 4, better, or not.

A file: the magic bytes, CRC-32 of all that follows, length of the header (both uint32, little
endian), the header (JSON, deflated), then the parts of each tensor in its order.
"""

import json
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fbnas.compression.coding import MOST_SYMBOLS, Coder, coder
from fbnas.compression.grids import Grid, find_grid
from fbnas.errors import InputError
from fbnas.files import atomic_write
from fbnas.space.network import Network, NetworkCard, load_network, load_tensors_

MAGIC = b"fbnas\x00p\x01"  # the last byte is the version
FRAME = struct.Struct("<II")
PACKED_FILE = "weights.packed"
PAYS_BELOW = 0.9  # of the dense size: a file that is hardly smaller is not worth its time
GAP_BITS = range(1, 9)
WORTH_TRYING = 1.3  # of the least estimate: the arithmetic coder may do so much better than that
SAMPLE = 16384  # values of which so many differ that no codebook is looked for
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}

Make = Callable[[], "tuple[PackedTensor, bytes]"]


@dataclass(frozen=True)
class PackedTensor:
    """How a tensor is stored.

    Args:
        form: dense, shared, sparse, sparse_shared or grid.
        kept: values that are stored: those that are not zero, or all.
        clusters: length of the codebook, 0 without one; of a grid the number of its levels.
        gap_bits: of a relative position, 0 where all values are stored.
        gaps: relative positions, fillers included.
        columns: whether positions go through columns, then rows.
        position_bytes, index_bytes, value_bytes: sizes of the parts; values are the codebook, the
            scales of a grid, or what is stored as it is.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    form: str
    kept: int
    clusters: int = 0
    gap_bits: int = 0
    gaps: int = 0
    columns: bool = False
    position_bytes: int = 0
    index_bytes: int = 0
    value_bytes: int = 0

    @property
    def numel(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def bytes(self) -> int:
        """Size of all parts."""
        return self.position_bytes + self.index_bytes + self.value_bytes


def pack(model: nn.Module | Mapping[str, Tensor], coder: str = "huffman") -> bytes:
    """Return all tensors of a network's state, packed.

    Args:
        model: or its `state_dict()`.
        coder: huffman; arithmetic, which is smaller and a few times slower; or fixed bits.

    Raises:
        InputError: an unknown coder, or a tensor of a type that is not stored.
    """
    tensors = model.state_dict() if isinstance(model, nn.Module) else model
    made = [_packed(name, tensor, coder) for name, tensor in tensors.items()]
    rows = [astuple(row) for row, _ in made]
    header = zlib.compress(json.dumps([coder, rows], separators=(",", ":")).encode(), 9)
    body = header + b"".join(parts for _, parts in made)
    return MAGIC + FRAME.pack(zlib.crc32(body), len(header)) + body


def unpack(data: bytes, source: str = "the packed weights") -> dict[str, Tensor]:
    """Return the tensors that `pack` was given, each with the same bits.

    Args:
        source: what errors name.

    Raises:
        InputError: damaged, of another version, or not packed by fbnas.
    """
    coder_name, rows, body = _opened(data, source)
    try:
        chosen, tensors, place = coder(coder_name), {}, 0
        for row in rows:
            tensors[row.name] = _unpacked(row, body[place : place + row.bytes], chosen)
            place += row.bytes
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise _refused(source, f"they do not fit their header: {error}") from error
    return tensors


def unpack_(model: nn.Module, data: bytes, source: str = "the packed weights") -> None:
    """Load packed tensors into a network in place, which takes the widths that they have.

    Raises:
        InputError: as `unpack`, or they belong to another network.
    """
    load_tensors_(model, unpack(data, source), source)


def describe(data: bytes, source: str = "the packed weights") -> tuple[PackedTensor, ...]:
    """Return how each tensor is stored.

    Raises:
        InputError: as `unpack`.
    """
    return tuple(_opened(data, source)[1])


def write_packed(model: nn.Module, path: Path | str, coder: str = "huffman") -> int:
    """Write a network's tensors packed; returns the size in bytes."""
    data = pack(model, coder)
    atomic_write(path, data)
    return len(data)


def read_packed(path: Path | str) -> dict[str, Tensor]:
    """Read tensors back.

    Raises:
        InputError: no such file, or as `unpack`.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a network's packed weights.")
    return unpack(path.read_bytes(), str(path))


def load_any(folder: Path | str) -> tuple[Network, NetworkCard]:
    """Read a network as `load_network` does, or from packed weights where it has only those.

    Raises:
        InputError: no network there, or files that do not belong together.
    """
    folder = Path(folder)
    packed = folder / PACKED_FILE
    if (folder / "weights.safetensors").is_file() or not packed.is_file():
        return load_network(folder)
    return load_network(folder, read_packed(packed))


def _opened(data: bytes, source: str) -> tuple[str, list[PackedTensor], bytes]:
    """Return the coder, how tensors are stored, and their parts."""
    begin = len(MAGIC) + FRAME.size
    if data[: len(MAGIC) - 1] != MAGIC[:-1] or len(data) < begin:
        raise _refused(source, "they do not begin as such a file")
    if data[len(MAGIC) - 1] != MAGIC[-1]:
        raise _refused(source, f"version {data[len(MAGIC) - 1]}, this fbnas reads {MAGIC[-1]}")
    checksum, length = FRAME.unpack_from(data, len(MAGIC))
    body = data[begin:]
    if zlib.crc32(body) != checksum:
        raise _refused(source, "the checksum is not that of the content")
    try:
        name, rows = json.loads(zlib.decompress(body[:length]))
        found = [PackedTensor(row[0], row[1], tuple(row[2]), *row[3:]) for row in rows]
    except (LookupError, ValueError, TypeError, zlib.error) as error:
        raise _refused(source, f"the header cannot be read: {error}") from error
    return name, found, body[length:]


def _refused(source: str, reason: str) -> InputError:
    return InputError(
        f"{source}: {reason}; expected weights packed by fbnas. Write them again with the command "
        "that made them."
    )


def _packed(name: str, tensor: Tensor, coder_name: str) -> tuple[PackedTensor, bytes]:
    """Return the smallest form of a tensor: how it is stored, and its parts joined."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise InputError(f"{name} is of type {dtype}; expected one of {', '.join(DTYPES)}.")
    bits = _bits(tensor)
    row = PackedTensor(name, dtype, tuple(tensor.shape), "dense", len(bits))
    plans = list(_plans(row, bits, coder(coder_name)))
    least = min(estimate for estimate, _ in plans)
    made = [make() for estimate, make in plans if estimate <= WORTH_TRYING * least]
    return min(made, key=lambda done: done[0].bytes)


def _bits(tensor: Tensor) -> np.ndarray:
    """Return the elements of a tensor as unsigned numbers of the same bits: (n,)."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().view(f"<u{tensor.element_size()}")


def _plans(row: PackedTensor, bits: np.ndarray, coder: Coder) -> Iterator[tuple[float, Make]]:
    """Yield every form that a tensor may be stored in: an estimate of its bits, what makes it.

    Args:
        row: of the tensor stored as it is.
        bits: (n,) unsigned.
    """
    yield 8.0 * bits.nbytes, partial(_with_parts, row, values=bits.tobytes())
    codebook = _codebook(bits)
    if codebook is not None:
        estimate = _indexed_bits(bits, codebook, coder)
        yield estimate, partial(_shared, row, bits, codebook, coder)
    if (grid := _grid(row, bits)) is not None:
        counts = np.bincount((grid.levels + grid.highest).reshape(-1))
        yield coder.bits(counts) + 8 * grid.scales.nbytes, partial(_gridded, row, grid, coder)
    if bits.all():
        return
    stored = bits[bits != 0]
    codebook = _codebook(stored)
    for columns in (False, True) if len(row.shape) > 1 and row.shape[0] > 1 else (False,):
        ordered = bits.reshape(row.shape[0], -1).T.reshape(-1) if columns else bits
        places = np.flatnonzero(ordered)
        zeros, kept = np.diff(places, prepend=-1) - 1, ordered[places]
        estimate, width = min((coder.bits(_gap_counts(zeros, width)), width) for width in GAP_BITS)
        there = replace(row, form="sparse", kept=len(kept), gap_bits=width, columns=columns)
        yield estimate + 8 * kept.nbytes, partial(_sparse, there, zeros, kept, None, coder)
        if codebook is not None:
            estimate += _indexed_bits(kept, codebook, coder)
            yield estimate, partial(_sparse, there, zeros, kept, codebook, coder)


def _shared(
    row: PackedTensor, bits: np.ndarray, codebook: np.ndarray, coder: Coder
) -> tuple[PackedTensor, bytes]:
    return _with_parts(
        replace(row, form="shared", clusters=len(codebook)),
        indices=coder.encode(np.searchsorted(codebook, bits), len(codebook)),
        values=codebook.tobytes(),
    )


def _grid(row: PackedTensor, bits: np.ndarray) -> Grid | None:
    """Return the grid of weights that lie on one: float32 tensors of several dimensions alone."""
    if row.dtype != "float32" or len(row.shape) < 2 or not len(bits):
        return None
    return find_grid(bits.view(np.float32).reshape(row.shape[0], -1))


def _gridded(row: PackedTensor, grid: Grid, coder: Coder) -> tuple[PackedTensor, bytes]:
    levels = 2 * grid.highest + 1
    return _with_parts(
        replace(row, form="grid", clusters=levels),
        indices=coder.encode((grid.levels + grid.highest).reshape(-1), levels),
        values=grid.scales.tobytes(),
    )


def _sparse(
    row: PackedTensor,
    zeros: np.ndarray,
    kept: np.ndarray,
    codebook: np.ndarray | None,
    coder: Coder,
) -> tuple[PackedTensor, bytes]:
    """Make a sparse form.

    Args:
        zeros: (kept,) that come before each value.
        codebook: None to store the values as they are.
    """
    gaps = _gaps(zeros, row.gap_bits)
    positions = coder.encode(gaps, 1 << row.gap_bits)
    row = replace(row, gaps=len(gaps))
    if codebook is None:
        return _with_parts(row, positions=positions, values=kept.tobytes())
    return _with_parts(
        replace(row, form="sparse_shared", clusters=len(codebook)),
        positions=positions,
        indices=coder.encode(np.searchsorted(codebook, kept), len(codebook)),
        values=codebook.tobytes(),
    )


def _indexed_bits(bits: np.ndarray, codebook: np.ndarray, coder: Coder) -> float:
    """Estimate the bits of indices into a codebook, and of the codebook."""
    counts = np.bincount(np.searchsorted(codebook, bits), minlength=len(codebook))
    return coder.bits(counts) + 8 * codebook.nbytes


def _with_parts(
    row: PackedTensor, *, positions: bytes = b"", indices: bytes = b"", values: bytes = b""
) -> tuple[PackedTensor, bytes]:
    row = replace(
        row,
        position_bytes=len(positions),
        index_bytes=len(indices),
        value_bytes=len(values),
    )
    return row, positions + indices + values


def _codebook(bits: np.ndarray) -> np.ndarray | None:
    """Return the values that occur, ascending; None if they are too many to be shared."""
    if not len(bits) or len(np.unique(bits[:SAMPLE])) > MOST_SYMBOLS:
        return None
    values = np.unique(bits)
    return values if len(values) <= min(MOST_SYMBOLS, len(bits) // 2) else None


def _gap_counts(zeros: np.ndarray, width: int) -> np.ndarray:
    """Return how often each gap of `width` bits occurs, the filler last."""
    filler = (1 << width) - 1
    counts = np.bincount(zeros % filler, minlength=filler + 1)
    counts[filler] = (zeros // filler).sum()
    return counts


def _gaps(zeros: np.ndarray, width: int) -> np.ndarray:
    """Return the gaps of `width` bits: before each weight its fillers, then the zeros left over."""
    filler = (1 << width) - 1
    gaps = np.full(len(zeros) + int((zeros // filler).sum()), filler)
    gaps[np.cumsum(zeros // filler + 1) - 1] = zeros % filler
    return gaps


def _unpacked(row: PackedTensor, parts: bytes, coder: Coder) -> Tensor:
    dtype = DTYPES[row.dtype]
    unsigned = f"<u{dtype.itemsize}"
    indices_at = row.position_bytes
    values_at = indices_at + row.index_bytes
    stored = np.frombuffer(parts[values_at:], unsigned)
    if row.form == "grid":
        highest = row.clusters // 2
        levels = coder.decode(parts[:values_at], row.kept, row.clusters) - highest
        grid = Grid(levels.reshape(row.shape[0], -1), stored.view(np.float32), highest)
        stored = grid.weights().reshape(-1).view(unsigned)
    elif row.clusters:
        stored = stored[coder.decode(parts[indices_at:values_at], row.kept, row.clusters)]
    if row.gap_bits:
        filler = (1 << row.gap_bits) - 1
        gaps = coder.decode(parts[:indices_at], row.gaps, filler + 1)
        places = np.cumsum(np.where(gaps == filler, filler, gaps + 1)) - 1
        bits = np.zeros(row.numel, unsigned)
        bits[places[gaps != filler]] = stored
    else:
        bits = stored.copy()
    if row.columns:
        bits = np.ascontiguousarray(bits.reshape(-1, row.shape[0]).T).reshape(-1)
    return torch.from_numpy(bits.view(np.uint8)).view(dtype).reshape(row.shape)
