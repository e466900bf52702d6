"""What is asked of our kernels, and whether the rows show it.

On a CPU (float32, CPU_SHAPES): times against bare products, never slower than eager, and less than
64 MiB beyond the outputs and gradients. On a GPU (bfloat16, 8192 rows): times against bare
products, ahead of every peer in time, and in memory under some bound of the workspace, since
fastest and leanest are two ends of one curve; gae and token_rewards against a copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.products import BOTH, FORWARD
from benchmarks.rows import Row
from benchmarks.shapes import CPU_SHAPES

OURS = "s2srm-"
# The backend that "auto" takes on the device; the others are there to compare.
DEFAULT_IMPL = {"cpu": "s2srm-cpp", "cuda": "s2srm-triton"}
_RATIOS = {
    ("cpu", "linear_token_stats", FORWARD): 1.15,
    ("cpu", "linear_cross_entropy", BOTH): 1.15,
    ("cpu", "linear_logprobs", BOTH): 1.15,
    ("cuda", "linear_token_stats", FORWARD): 1.15,
    ("cuda", "linear_cross_entropy", BOTH): 1.10,
    ("cuda", "linear_ppo_loss", BOTH): 1.10,
    ("cuda", "linear_logprobs", BOTH): 1.15,
}
_GPU_ROWS = 8192
_CPU_MEMORY_MIB = 64.0
_COPY_RATIO = 2.0
_LONG, _SHORT, _SHORT_MS = 2**24, 2**13, 0.020


@dataclass(frozen=True)
class Verdict:
    """One claim about one row: what was measured, what was asked."""

    row: Row
    claim: str
    measured: str
    asked: str
    met: bool


def is_ours(row: Row) -> bool:
    return row.provider.startswith(OURS)


def device_kind(row: Row) -> str:
    return "cpu" if row.device.startswith("CPU") else "cuda"


def same_call(row: Row) -> tuple[object, ...]:
    """What two rows share whose providers can be compared."""
    return (row.device, row.op, row.shape, row.dtype, row.ignored, row.mode, row.inputs)


def beyond_results_mib(row: Row) -> float | None:
    """Peak memory less the outputs and gradients."""
    if row.peak_extra_mib is None:
        return None
    return max(0.0, row.peak_extra_mib - (row.result_mib or 0.0))


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """All claims that the rows of our default backends say something about, in their order."""
    found: list[Verdict] = []
    for row in rows:
        if not is_ours(row):
            continue
        if row.hidden_size is None:
            found += _sequence_verdicts(row)
        elif row.provider == DEFAULT_IMPL[device_kind(row)]:
            call = [r for r in rows if same_call(r) == same_call(row)]
            bounded = [r for r in call if r.provider.startswith(f"{row.provider}-")]
            peers = [r for r in call if not is_ours(r)]
            found += _vocabulary_verdicts(row, peers, bounded)
    return found


def _vocabulary_verdicts(row: Row, peers: Iterable[Row], bounded: Iterable[Row]) -> list[Verdict]:
    """bounded: rows of the same backend with a bound on its workspace: the lean end."""
    device = device_kind(row)
    if row.passed is not None:
        worst = _worst_error(row)
        found = [Verdict(row, "error over eager's", f"{worst:.2f}", "2", row.passed)]
    else:
        found = []
    if row.p50_ms is None or row.ratio is None:
        return found
    ratio = _RATIOS.get((device, row.op, row.mode))
    shapes = [shape.name for shape in CPU_SHAPES]
    asked_here = row.shape in shapes if device == "cpu" else row.num_rows == _GPU_ROWS
    if ratio is not None and asked_here:
        claim = f"time over {row.anchor}"
        found.append(Verdict(row, claim, f"{row.ratio:.3f}", f"{ratio:g}", row.ratio <= ratio))
    timed = [peer for peer in peers if peer.p50_ms is not None]
    if device == "cpu":
        timed = [peer for peer in timed if peer.provider == "torch-eager"]
        extra = beyond_results_mib(row)
        if extra is not None and asked_here:
            asked = f"{_CPU_MEMORY_MIB:g}"
            met = extra < _CPU_MEMORY_MIB
            found.append(Verdict(row, "MiB beyond results", f"{extra:.1f}", asked, met))
    if timed:
        fastest = min(timed, key=lambda peer: (peer.p50_ms or 0.0, peer.provider))
        speedup = (fastest.p50_ms or 0.0) / row.p50_ms
        claim = f"speed over {fastest.provider}"
        found.append(Verdict(row, claim, f"{speedup:.2f}", "1", speedup >= 1))
    lean = [peer for peer in timed if peer.peak_extra_mib is not None]
    ours = [mine for mine in (row, *bounded) if mine.peak_extra_mib is not None]
    if lean and ours and device == "cuda":
        leanest, least = _leanest(lean)
        mine, peak = _leanest(ours)
        claim = f"peak MiB of {mine.provider}, least of peers: {leanest.provider}"
        found.append(Verdict(row, claim, f"{peak:.1f}", f"{least:.1f}", peak <= least))
    return found


def _leanest(rows: Iterable[Row]) -> tuple[Row, float]:
    peaks = ((row.peak_extra_mib, row) for row in rows)
    peak, _, row = min((p, row.provider, row) for p, row in peaks if p is not None)
    return row, peak


def _sequence_verdicts(row: Row) -> list[Verdict]:
    """gae and token_rewards on a GPU; the fastest backend there is `cpp`, in CUDA C++."""
    if device_kind(row) != "cuda" or row.provider != f"{OURS}cpp" or row.p50_ms is None:
        return []
    if row.num_rows == _LONG and row.ratio is not None:
        met = row.ratio <= _COPY_RATIO
        return [Verdict(row, "time over copy", f"{row.ratio:.2f}", f"{_COPY_RATIO:g}", met)]
    if row.num_rows == _SHORT and row.kernel_ms is not None:
        microseconds = f"{row.kernel_ms * 1e3:.1f}"
        asked, met = f"{_SHORT_MS * 1e3:g}", row.kernel_ms < _SHORT_MS
        return [Verdict(row, "microseconds of kernels", microseconds, asked, met)]
    return []


def _worst_error(row: Row) -> float:
    """Largest of the errors over eager's, 0 where both are exact."""
    pairs = [(row.errors[name], row.eager_errors.get(name, 0.0)) for name in row.errors]
    return max((error / eager for error, eager in pairs if eager > 0), default=0.0)
