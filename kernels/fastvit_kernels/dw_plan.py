"""Work schedule of a weight gradient, in which all programs sum about equally many rows.

dW has `tiles` tiles of float32, each the sum of `steps` blocks of rows, for `programs` persistent
programs. First each program takes whole tiles, in rounds. The tiles left, fewer than the programs,
are each cut into `chunks` parts of `share` steps, one per program; the rest of each such tile goes
to the programs still idle: one whole rest per program and round, those of the last, unfinished
round in `chunks2` parts. Concurrent programs thus walk over the same rows and share them in L2
(in stream-K's even split of all steps, each would be at other rows).
The parts of a tile are adjacent slabs, added in order: bitwise repeatable, no atomics.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from fastvit_kernels.launch import cdiv

PLAN = ("tiles", "steps", "programs", "chunks", "share", "chunks2")  # kernels' arguments


@dataclass(frozen=True)
class Plan:
    tiles: int
    steps: int
    programs: int
    chunks: int
    share: int
    chunks2: int

    @property
    def arguments(self) -> tuple[int, int, int, int, int, int]:
        """The fields in the kernels' order of arguments."""
        return self.tiles, self.steps, self.programs, self.chunks, self.share, self.chunks2

    @property
    def parts(self) -> int:
        """Number of slabs: float32 tiles that are written, then read to be added."""
        left = self.tiles % self.programs
        _, rounds, idle, last = self._again()
        return self.tiles - left + left * self.chunks + rounds * idle + last * self.chunks2

    def longest(self, stretch: float = 0) -> float:
        """Steps of the busiest program, each of its segments counted as `stretch` steps longer."""
        rest, rounds, _, last = self._again()
        again = rounds * (rest + stretch)
        again += cdiv(rest, self.chunks2) + stretch if last else 0
        whole = self.tiles // self.programs * (self.steps + stretch)
        if self.tiles % self.programs == 0:
            return whole
        return whole + max(min(self.share, self.steps) + stretch, again)

    def columns(self, num_n: int) -> int:
        """How many columns of tiles, `num_n` tiles each, can share the sums of db: all if all tiles
        are cut alike; else those of uncut tiles only, but at least the first, however it is cut.
        """
        whole = self.tiles // self.programs * self.programs
        if whole in (0, self.tiles):
            return self.tiles // num_n
        return max(1, whole // num_n)

    def _again(self) -> tuple[int, int, int, int]:
        """rest, rounds, idle, last: steps that the chunks leave of each tile, whole rounds of such
        rests, programs per round, rests in the last, unfinished round.
        """
        left = self.tiles % self.programs
        rest, idle = self.steps - self.chunks * self.share, self.programs - left * self.chunks
        if left == 0 or rest <= 0:
            return 0, 0, 0, 0
        return rest, left // idle, idle, left % idle


def even(tiles: int, steps: int, parts: int) -> Plan:
    """The plan that cuts every tile into at most `parts` equal parts, one program per part."""
    share = cdiv(steps, parts)
    parts = cdiv(steps, share)
    return Plan(tiles, steps, tiles * parts, parts if parts > 1 else 0, share, 0)


def plan(tiles: int, steps: int, programs: int, part_steps: float) -> Plan:
    """The plan of least `time` for `programs` programs."""
    left = tiles % programs
    if left == 0:
        return Plan(tiles, steps, programs, 0, steps, 0)
    # Candidates: the remaining tiles in even parts, as many as there are programs for, or fewer.
    most = programs // left
    shares = sorted({cdiv(steps, chunks) for chunks in range(1, most + 1)})
    plans = [Plan(tiles, steps, programs, cdiv(steps, share), share, 0) for share in shares]
    # Or chunks that leave a rest to the idle programs: so that all programs have equally many
    # steps, or so that n whole rests take as long as a chunk.
    idle = programs - left * most
    if idle:
        last, rounds = left % idle, range(left // idle, cdiv(left, idle) + 1)
        even_share = cdiv(left * steps, programs)
        shares = {even_share, *(cdiv(n * steps, n * most + 1) for n in rounds)}
        for share in sorted(shares):
            rest = steps - most * share
            if 0 < rest and share > 0:
                chunks2 = cdiv(rest, cdiv(rest, idle // last)) if last else 0
                plans.append(Plan(tiles, steps, programs, most, share, chunks2))
    return min(plans, key=lambda p: time(p, part_steps))


def time(plan: Plan, part_steps: float) -> float:
    """Estimated time of a plan, in steps of one program. part_steps: how many steps take as long as
    writing and reading one part.

    A part's own program pays for filling the pipeline and writing it; all share the reading.
    """
    return plan.longest(0.6 * part_steps) + 0.5 * part_steps * plan.parts / plan.programs


@triton.jit
def _rounds(tiles, steps, programs, chunks, share):
    """whole, left, idle, rounds, last: rounds of whole tiles, tiles left, programs for their rests,
    whole rounds of rests, rests in the last, unfinished round (both 0 if chunks leave no rest).
    """
    whole = tiles // programs
    left = tiles - whole * programs
    idle = tl.maximum(programs - left * chunks, 1)
    remains = tl.where(chunks * share < steps, left, 0)
    rounds = remains // idle
    return whole, left, idle, rounds, remains - rounds * idle


@triton.jit
def first_part(tile, tiles, steps, programs, chunks, share, chunks2):
    """Slab index of a tile's first part; its parts end where the next tile's begin."""
    whole, _, idle, rounds, last = _rounds(tiles, steps, programs, chunks, share)
    t = tl.maximum(tile - whole * programs, 0)
    again = tl.minimum(t, rounds * idle) + tl.maximum(t - rounds * idle, 0) * chunks2
    return tile - t + t * chunks + tl.where(rounds + last > 0, again, 0)


@triton.jit
def num_segments(pid, tiles, steps, programs, chunks, share, chunks2):
    """Number of segments (consecutive steps of one tile) that a program sums."""
    whole, left, _, rounds, last = _rounds(tiles, steps, programs, chunks, share)
    q = pid - left * chunks
    return whole + tl.where(q < 0, 1, rounds + tl.where(q < last * chunks2, 1, 0))


@triton.jit
def segment(pid, i, tiles, steps, programs, chunks, share, chunks2):
    """Tile, first step, end step (exclusive) and slab of a program's i-th segment."""
    whole, left, idle, rounds, last = _rounds(tiles, steps, programs, chunks, share)
    q, j = pid - left * chunks, i - whole
    tile, first, end, nth = pid + i * programs, 0, steps, 0
    if j >= 0:
        if q < 0:
            tile, nth = pid % left, pid // left
            first = nth * share
            end = tl.minimum(first + share, steps)
        else:
            first = chunks * share
            tile, nth = q + j * idle, chunks
            if j == rounds:
                share2 = tl.cdiv(steps - first, tl.maximum(chunks2, 1))
                tile, nth = rounds * idle + q % last, q // last
                first += nth * share2
                nth += chunks
                end = tl.minimum(first + share2, steps)
        tile += whole * programs
    part = first_part(tile, tiles, steps, programs, chunks, share, chunks2) + nth
    return tile, first, end, part


@triton.jit
def owned(column, columns, first, end, steps, chunks, share):
    """First and end step (exclusive), within a segment, of those that tile column `column` sums for
    db: an even share of the segment, or of the tile's rest, if the segment is that or a part of it.
    """
    cut = chunks * share
    from_step, to_step = tl.where(first >= cut, cut, first), tl.where(first >= cut, steps, end)
    part = to_step - from_step
    lo = from_step + part * column // columns
    hi = from_step + part * (column + 1) // columns
    return tl.minimum(tl.maximum(lo, first), end), tl.minimum(tl.maximum(hi, first), end)
