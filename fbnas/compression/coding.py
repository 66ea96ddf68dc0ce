"""Coders: whole numbers below k to bytes and back, in fixed bits, a Huffman code, and better.

Fixed bits are ceil(log2 k) a symbol, 2 of ternary weights, as formulas of rates have them.
Huffman spends whole bits on a symbol and keeps its code lengths in the bytes. The arithmetic coder
spends fractions of bits, follows frequencies that change along the way, and keeps no table: it
learns the frequencies while it reads as it did while it wrote. It is an asymmetric numeral system
(Duda 2013, arXiv 1311.2540, section 3) with a range of symbols, done for many states side by side.
"""

import heapq
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from fbnas.errors import unknown

MOST_SYMBOLS = 4096
LONGEST = 15  # bits of a Huffman code word: tables of 2**15 entries decode it
TOTAL_BITS = 15  # frequencies of the arithmetic coder add up to 2**15
STATE_BITS = 24  # its states lie in [2**24, 2**40)
WORD_BITS = 16  # and shed words of 16 bits
LANE_SYMBOLS = 4096  # a state for each so many symbols costs 3 bytes
MOST_LANES = 1024
BLOCK = 64  # symbols coded between two looks at the frequencies, at most, or one of each state
GAIN = 8  # of the count of a symbol that is seen
MEMORIES = (10, 13, 18)  # log2 of the symbols after which what was seen counts half
ARITHMETIC = 0xFF  # this byte less the place in MEMORIES begins a stream; lower ones Huffman's


@dataclass(frozen=True)
class Coder:
    """What turns symbols, whole numbers (n,) from 0 to k - 1, into bytes and back.

    encode: symbols, k to bytes. decode: bytes, n, k to symbols (n,) int64. bits: an estimate of the
    size from how often each symbol occurs, (k,).
    """

    encode: Callable[[np.ndarray, int], bytes]
    decode: Callable[[bytes, int, int], np.ndarray]
    bits: Callable[[np.ndarray], float]


def coder(name: str) -> Coder:
    """Return the coder of a name.

    Raises:
        InputError: an unknown one.
    """
    if name not in CODERS:
        raise unknown("coder", name, CODERS)
    return CODERS[name]


def huffman_lengths(counts: np.ndarray) -> np.ndarray:
    """Return the bits of each symbol's code word, 0 where it does not occur.

    The code is Huffman's, of least expected length, where no word is longer than `LONGEST`;
    otherwise that of halved counts, which are less uneven.

    Args:
        counts: (k,) how often each symbol occurs.
    """
    lengths = _code_lengths(counts)
    while lengths.max(initial=0) > LONGEST:
        counts = (counts + 1) // 2
        lengths = _code_lengths(counts)
    return lengths


def _code_lengths(counts: np.ndarray) -> np.ndarray:
    lengths = np.zeros(len(counts), np.int64)
    used = np.flatnonzero(counts)
    if len(used) == 1:
        lengths[used] = 1
    heap = [(int(counts[i]), int(i), [int(i)]) for i in used]
    heapq.heapify(heap)
    while len(heap) > 1:
        (a, first, left), (b, _, right) = heapq.heappop(heap), heapq.heappop(heap)
        both = left + right
        lengths[both] += 1
        heapq.heappush(heap, (a + b, first, both))
    return lengths


def _code_words(lengths: np.ndarray) -> np.ndarray:
    """Return the canonical code: words of a length ascend by symbol, and after shorter ones."""
    words, word, before = np.zeros(len(lengths), np.int64), 0, 0
    for symbol in np.lexsort((np.arange(len(lengths)), lengths)):
        length = int(lengths[symbol])
        if length:
            word <<= length - before
            words[symbol], before = word, length
            word += 1
    return words


def _huffman_encode(symbols: np.ndarray, k: int) -> bytes:
    lengths = huffman_lengths(np.bincount(symbols, minlength=k))
    if np.count_nonzero(lengths) < 2:  # the table says it all
        return _nibbles(lengths)
    widths, words = lengths[symbols], _code_words(lengths)[symbols]
    ends = np.cumsum(widths)
    bits = np.zeros(int(ends[-1]), np.uint8)
    for place in range(int(lengths.max())):  # from the last bit of each word
        there = widths > place
        bits[ends[there] - 1 - place] = (words[there] >> place) & 1
    return _nibbles(lengths) + np.packbits(bits).tobytes()


def _huffman_decode(data: bytes, n: int, k: int) -> np.ndarray:
    table = (k + 1) // 2
    lengths = _from_nibbles(data[:table], k)
    used = np.flatnonzero(lengths)
    if len(used) < 2:
        return np.full(n, used[0] if len(used) else 0, np.int64)
    symbol_of = np.zeros(1 << LONGEST, np.int64)
    for symbol, word in zip(used, _code_words(lengths)[used], strict=True):
        spare = LONGEST - int(lengths[symbol])
        symbol_of[word << spare : (word + 1) << spare] = symbol
    found = symbol_of[_windows(data[table:])]
    steps = lengths[found].astype(np.uint8).tobytes()
    places, place = [], 0
    for _ in range(n):
        places.append(place)
        place += steps[place]
    return found[places]


def _windows(data: bytes) -> np.ndarray:
    """Return the `LONGEST` bits that follow each bit, as numbers; zeros come after the last."""
    padded = np.frombuffer(data + bytes(3), np.uint8).astype(np.uint32)
    triples = padded[:-2] << 16 | padded[1:-1] << 8 | padded[2:]
    shifts = np.uint32(24 - LONGEST) - np.arange(8, dtype=np.uint32)
    return (triples[:, None] >> shifts & ((1 << LONGEST) - 1)).reshape(-1)


def _nibbles(lengths: np.ndarray) -> bytes:
    even = np.append(lengths, [0] * (len(lengths) % 2)).astype(np.uint8)
    return (even[::2] << 4 | even[1::2]).tobytes()


def _from_nibbles(data: bytes, k: int) -> np.ndarray:
    pairs = np.frombuffer(data, np.uint8)
    return np.stack([pairs >> 4, pairs & 15], axis=1).reshape(-1)[:k].astype(np.int64)


def _huffman_bits(counts: np.ndarray) -> float:
    lengths = huffman_lengths(counts)
    coded = float(counts @ lengths) if np.count_nonzero(lengths) > 1 else 0.0
    return coded + 4 * len(counts)


class _Frequencies:
    """Adaptive frequencies of k symbols that add up to 2**TOTAL_BITS, each at least 1.

    Every symbol begins with a count of 1 and gains `GAIN` when it is seen, so that symbols that
    never come cost little; counts are halved when they stand for 2**memory symbols.
    """

    def __init__(self, k: int, memory: int) -> None:
        self.counts = np.ones(k, np.int64)
        self.limit = max(GAIN << memory, 4 * k)

    def table(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the frequencies and what comes before each: (k,), (k,)."""
        k, total = len(self.counts), int(self.counts.sum())
        frequencies = 1 + self.counts * ((1 << TOTAL_BITS) - k) // total
        frequencies[self.counts.argmax()] += (1 << TOTAL_BITS) - frequencies.sum()
        return frequencies, frequencies.cumsum() - frequencies

    def see(self, symbols: np.ndarray) -> None:
        self.counts += GAIN * np.bincount(symbols, minlength=len(self.counts))
        while self.counts.sum() > self.limit:
            self.counts = (self.counts + 1) // 2


def _lanes(n: int) -> int:
    return max(1, min(MOST_LANES, n // LANE_SYMBOLS))


def _blocks(n: int) -> Iterator[tuple[int, int]]:
    """Yield begin and end of the symbols that share a table: few at first, when each tells much.

    They are a whole number of steps of all lanes.
    """
    lanes, begin = _lanes(n), 0
    while begin < n:
        symbols = min(BLOCK, 1 + begin // 8)
        end = min(n, begin + lanes * max(1, symbols // lanes))
        yield begin, end
        begin = end


def _modelled(symbols: np.ndarray, k: int, memory: int) -> tuple[np.ndarray, np.ndarray]:
    """Return frequency and start of each symbol as the model has them when it comes."""
    model = _Frequencies(k, memory)
    frequencies, starts = np.empty_like(symbols), np.empty_like(symbols)
    for begin, end in _blocks(len(symbols)):
        part = slice(begin, end)
        frequency, start = model.table()
        frequencies[part], starts[part] = frequency[symbols[part]], start[symbols[part]]
        model.see(symbols[part])
    return frequencies, starts


def _arithmetic_encode(symbols: np.ndarray, k: int) -> bytes:
    if k == 1 or len(symbols) == 0:
        return b""
    symbols = symbols.astype(np.int64)
    models = [_modelled(symbols, k, memory) for memory in MEMORIES]
    costs = [-np.log2(frequencies).sum() for frequencies, _ in models]
    chosen = int(np.argmin(costs))
    frequencies, starts = models[chosen]
    lanes = _lanes(len(symbols))
    states = np.full(lanes, 1 << STATE_BITS, np.int64)
    words: list[np.ndarray] = []
    for begin in reversed(range(0, len(symbols), lanes)):  # last in, first out
        f, start = frequencies[begin : begin + lanes], starts[begin : begin + lanes]
        x = states[: len(f)]
        full = x >= f << (STATE_BITS + WORD_BITS - TOTAL_BITS)
        if full.any():
            words.append((x[full] & 0xFFFF).astype("<u2"))
            x = np.where(full, x >> WORD_BITS, x)
        whole, rest = np.divmod(x, f)
        states[: len(f)] = (whole << TOTAL_BITS) + rest + start
    stream = b"".join(part.tobytes() for part in reversed(words))
    ends = states.astype("<u8").view(np.uint8).reshape(lanes, 8)[:, :5].tobytes()
    coded = bytes([ARITHMETIC - chosen]) + ends + stream
    plain = _huffman_encode(symbols, k)  # shorter for few symbols
    return plain if len(plain) <= len(coded) and not _is_arithmetic(plain) else coded


def _is_arithmetic(data: bytes) -> bool:
    return data[0] > ARITHMETIC - len(MEMORIES)


def _arithmetic_decode(data: bytes, n: int, k: int) -> np.ndarray:
    symbols = np.zeros(n, np.int64)
    if k == 1 or n == 0:
        return symbols
    if not _is_arithmetic(data):
        return _huffman_decode(data, n, k)
    lanes = _lanes(n)
    model = _Frequencies(k, MEMORIES[ARITHMETIC - data[0]])
    ends = np.zeros((lanes, 8), np.uint8)
    ends[:, :5] = np.frombuffer(data, np.uint8, 5 * lanes, 1).reshape(lanes, 5)
    states = ends.reshape(-1).view("<u8").astype(np.int64)
    words = np.frombuffer(data, "<u2", offset=1 + 5 * lanes).astype(np.int64)
    read, mask = 0, (1 << TOTAL_BITS) - 1
    for first, last in _blocks(n):
        frequency, start = model.table()
        symbol_of = np.repeat(np.arange(k), frequency)
        for begin in range(first, last, lanes):
            x = states[: min(lanes, last - begin)]
            slots = x & mask
            found = symbol_of[slots]
            x = frequency[found] * (x >> TOTAL_BITS) + slots - start[found]
            empty = x < 1 << STATE_BITS
            count = int(np.count_nonzero(empty))
            if count:
                x[empty] = x[empty] << WORD_BITS | words[read : read + count]
                read += count
            states[: len(x)] = x
            symbols[begin : begin + len(x)] = found
        model.see(symbols[first:last])
    return symbols


def _adaptive_bits(counts: np.ndarray) -> float:
    """Return what adaptive frequencies need where the order of the symbols says nothing.

    With a = 1 / GAIN, n symbols of k kinds and c_i of kind i, the probabilities (count so far + a)
    / (symbols so far + k a) multiply to G(k a) / G(n + k a) prod_i G(c_i + a) / G(a), G the gamma
    function. The ends of the states come in addition.
    """
    n, a = int(counts.sum()), 1 / GAIN
    used = counts[counts > 0].tolist()
    nats = math.lgamma(n + len(counts) * a) - math.lgamma(len(counts) * a)
    nats -= sum(map(math.lgamma, (c + a for c in used))) - len(used) * math.lgamma(a)
    return min(nats / math.log(2) + 32 * _lanes(n) + 8, _huffman_bits(counts))


def _fixed_bits(k: int) -> int:
    return (k - 1).bit_length()


def _fixed_encode(symbols: np.ndarray, k: int) -> bytes:
    places = np.arange(_fixed_bits(k))[::-1]
    bits = symbols[:, None] >> places & 1
    return np.packbits(bits.astype(np.uint8).reshape(-1)).tobytes()


def _fixed_decode(data: bytes, n: int, k: int) -> np.ndarray:
    width = _fixed_bits(k)
    bits = np.unpackbits(np.frombuffer(data, np.uint8), count=n * width).reshape(n, width)
    return bits.astype(np.int64) @ (1 << np.arange(width)[::-1])


CODERS = {
    "fixed": Coder(
        _fixed_encode, _fixed_decode, lambda counts: float(counts.sum() * _fixed_bits(len(counts)))
    ),
    "huffman": Coder(_huffman_encode, _huffman_decode, _huffman_bits),
    "arithmetic": Coder(_arithmetic_encode, _arithmetic_decode, _adaptive_bits),
}
