// token_rewards on CUDA: one pass of a segmented scan from the first row to the last.
//
// What a row needs to know of the rows before it in its sequence is one bit: has any of them
// diverged? Loads are reduced to a bit a row at once; carries are found by ballots, and an integer
// is all that passes between tiles. `prepare_kernel` gave every sequence its length as divergence
// index; the first row that diverges puts its own place there.
#pragma once

#include "scan.cuh"

namespace s2srm {

using RewardsShape = TileShape<512, 4>;

// Each reads four rows of the tile at `begin` and answers which diverge, as bits. Half and bfloat16
// arrive as float.
template <typename Response, typename Signal>
struct ArgmaxDiverges {
  using Result = float;
  const Response* response;
  const Signal* signal;

  __device__ __forceinline__ bool aligned() const {
    return is_aligned(response) && is_aligned(signal);
  }

  template <bool kWhole>
  __device__ __forceinline__ unsigned read(int64_t begin, int row, int num_rows) const {
    const auto ids = load_four<kWhole>(response + begin, row, num_rows);
    const auto best = load_four<kWhole>(signal + begin, row, num_rows);
    unsigned bits = 0;
#pragma unroll
    for (int j = 0; j < kVector; ++j)
      bits |= unsigned(static_cast<int64_t>(ids.values[j]) != best.values[j]) << j;
    return bits;
  }
};

template <typename Signal>
struct RankDiverges {
  using Result = float;
  const Signal* signal;
  int64_t top_k;

  __device__ __forceinline__ bool aligned() const { return is_aligned(signal); }

  template <bool kWhole>
  __device__ __forceinline__ unsigned read(int64_t begin, int row, int num_rows) const {
    const auto rank = load_four<kWhole>(signal + begin, row, num_rows);
    unsigned bits = 0;
#pragma unroll
    for (int j = 0; j < kVector; ++j) bits |= unsigned(rank.values[j] >= top_k) << j;
    return bits;
  }
};

template <typename Signal>
struct MarginDiverges {
  using Result = Signal;
  const Signal* signal;
  Signal max_margin;

  __device__ __forceinline__ bool aligned() const { return is_aligned(signal); }

  template <bool kWhole>
  __device__ __forceinline__ unsigned read(int64_t begin, int row, int num_rows) const {
    const auto margin = load_four<kWhole>(signal + begin, row, num_rows);
    unsigned bits = 0;
#pragma unroll
    for (int j = 0; j < kVector; ++j) bits |= unsigned(!(margin.values[j] <= max_margin)) << j;
    return bits;
  }
};

template <typename Diverges>
struct RewardsArguments {
  using T = typename Diverges::Result;
  Diverges diverges;
  CuSeqlens cu_seqlens;
  int64_t num_sequences, num_rows, num_tiles;
  T positive, negative, match;  // negative as it enters the rewards: not above 0
  uint64_t* words;              // (num_tiles,), zeros
  T* rewards;
  int64_t* divergence_index;  // (B,), the lengths
};

// What a run of rows does to the bit that enters it: sets it to 0 or 1, or lets it through.
enum : uint32_t { kAgrees = 0, kDiverged = 1, kThrough = 2 };

__device__ __forceinline__ uint32_t then(uint32_t before, uint32_t run) {
  return run == kThrough ? before : run;
}

// The same, of the lanes in `among` of a round: the nearest one that sets the bit.
__device__ __forceinline__ uint32_t run_of_lanes(unsigned setting, unsigned diverged,
                                                 unsigned among) {
  const unsigned nearest = setting & among;
  return nearest == 0 ? kThrough : diverged >> highest_bit(nearest) & 1u;
}

// The bit that enters `tile`, by one whole warp. The first tile is final without waiting; see
// scan.cuh.
__device__ __forceinline__ uint32_t carry_from_predecessors(const uint64_t* words, int64_t tile,
                                                            int lane) {
  for (int64_t seen = tile - 1 - lane;;) {
    Published<uint32_t> found{kEmpty, kThrough};
    if (seen >= 0) found = Published<uint32_t>::read(words, seen);
    const unsigned final_lanes = __ballot_sync(kAllLanes, found.flag == kFinal);
    const unsigned empty_lanes = __ballot_sync(kAllLanes, found.flag == kEmpty);
    const int nearest = final_lanes != 0 ? __ffs(final_lanes) - 1 : kLanes;
    const unsigned nearer = nearest < kLanes ? lanes_below(nearest) : kAllLanes;
    if ((empty_lanes & nearer) != 0) {
      __nanosleep(20);
    } else if (nearest < kLanes) {
      return __shfl_sync(kAllLanes, found.value, nearest);
    } else {
      seen -= kLanes;
    }
  }
}

// Rows beyond the last one do not diverge.
template <bool kWhole, typename Diverges, int kRounds>
__device__ __forceinline__ void read_rounds(const Diverges& diverges, int64_t begin, int lane_row,
                                            int num_rows, unsigned (&bits)[kRounds]) {
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    const int row = lane_row + r * kRoundRows;
    bits[r] = diverges.template read<kWhole>(begin, row, num_rows);
    if (!kWhole && num_rows - row < kVector)
      bits[r] &= num_rows > row ? lanes_below(num_rows - row) : 0;
  }
}

template <typename Diverges, int kThreads, int kRounds>
__global__ void __launch_bounds__(kThreads, 2)
    token_rewards_kernel(const RewardsArguments<Diverges> in) {
  using Shape = TileShape<kThreads, kRounds>;
  using T = typename Diverges::Result;
  __shared__ Marks<Shape::kRows> starts;
  __shared__ uint32_t warp_run[Shape::kWarps];
  __shared__ int warp_start[Shape::kWarps];  // the last row that begins a sequence, or -1
  __shared__ uint32_t tile_carry;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t tile = blockIdx.x, begin = tile * Shape::kRows;
  const int lane_row = warp * Shape::kWarpRows + lane * kVector;  // of round 0, in the tile

  // 1. One bit of every row.
  unsigned diverges[kRounds];
  const int num_rows = rows_from<Shape::kRows>(begin, in.num_rows);
  if (num_rows == Shape::kRows && in.diverges.aligned())
    read_rounds<true>(in.diverges, begin, lane_row, num_rows, diverges);
  else
    read_rounds<false>(in.diverges, begin, lane_row, num_rows, diverges);
  starts.template fill<Edge::first_row, kThreads>(in.cu_seqlens, in.num_sequences, begin,
                                                  num_rows);

  // 2. What each lane does to the bit, then the warp, then the tile.
  unsigned starting[kRounds], setting[kRounds], diverged[kRounds];  // by lane
  uint32_t run = kThrough;
  int start = -1;
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    const int row = lane_row + r * kRoundRows;
    const unsigned bits = starts.nibble(row);
    // The rows from the lane's last start on: all of them where it has none.
    const unsigned running = bits == 0 ? 0xfu : ~lanes_below(highest_bit(bits));
    starting[r] = __ballot_sync(kAllLanes, bits != 0);
    diverged[r] = __ballot_sync(kAllLanes, (diverges[r] & running) != 0);
    setting[r] = starting[r] | diverged[r];
    run = then(run, run_of_lanes(setting[r], diverged[r], kAllLanes));
    if (starting[r] != 0) {
      const int first = row - lane * kVector + highest_bit(starting[r]) * kVector;
      start = first + highest_bit(starts.nibble(first));
    }
  }
  if (lane == 0) {
    warp_run[warp] = run;
    warp_start[warp] = start;
  }
  __syncthreads();
  if (warp == 0) {
    run = tile == 0 ? kAgrees : kThrough;
    for (int w = 0; w < Shape::kWarps; ++w) run = then(run, warp_run[w]);
    const bool is_final = run != kThrough;
    if (lane == 0) Published<uint32_t>::write(in.words, tile, is_final ? kFinal : kPartial, run);
    const uint32_t carry = tile == 0 ? kAgrees : carry_from_predecessors(in.words, tile, lane);
    if (lane == 0) {
      if (!is_final) Published<uint32_t>::write(in.words, tile, kFinal, carry);
      tile_carry = carry;
    }
  }
  __syncthreads();

  // 3. The bit that enters the warp, the round, the lane; then the rows.
  uint32_t carry = tile_carry;
  start = -1;
  for (int w = 0; w < warp; ++w) {
    carry = then(carry, warp_run[w]);
    start = warp_start[w] >= 0 ? warp_start[w] : start;
  }
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    const int row = lane_row + r * kRoundRows, round_row = row - lane * kVector;
    const unsigned bits = starts.nibble(row), before = lanes_below(lane);
    uint32_t seen = then(carry, run_of_lanes(setting[r], diverged[r], before));
    unsigned firsts = 0;  // rows that are the first of their sequence to diverge
    Four<T> rewards;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const unsigned own = diverges[r] >> j & 1u;
      if (bits >> j & 1u) seen = kAgrees;
      firsts |= (own & ~seen) << j;
      seen |= own;
      rewards.values[j] = seen == kAgrees ? in.positive : own ? in.negative : in.match;
    }
    // Once a sequence, so worth a search for where the sequence began.
#pragma unroll 1
    for (; firsts != 0; firsts &= firsts - 1) {
      const int j = __ffs(firsts) - 1;
      const unsigned here = bits & lanes_below(j + 1), lanes = starting[r] & before;
      int from = start;
      if (here != 0) {
        from = row + highest_bit(here);
      } else if (lanes != 0) {
        from = round_row + highest_bit(lanes) * kVector;
        from += highest_bit(starts.nibble(from));
      }
      const int64_t b = from >= 0 ? starts.sequence_at(from) : starts.first - 1;
      if (b >= 0 && b < in.num_sequences)
        in.divergence_index[b] = begin + row + j - in.cu_seqlens[b];
    }
    store_four(in.rewards + begin, row, num_rows, rewards);
    carry = then(carry, run_of_lanes(setting[r], diverged[r], kAllLanes));
    if (starting[r] != 0) {
      start = round_row + highest_bit(starting[r]) * kVector;
      start += highest_bit(starts.nibble(start));
    }
  }
}

}  // namespace s2srm
