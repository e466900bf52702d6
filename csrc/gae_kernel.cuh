// gae on CUDA: one pass of a segmented scan from the last row to the first.
//
//     delta_t = r_t + gamma * V_{t+1} - V_t,   A_t = delta_t + decay * A_{t+1}
//
// Rows after which nothing comes in their sequence ("ends") take no A_{t+1}. What a run of n rows
// without an end does to the A that enters from its right is A -> decay^n * A + (its own sum), so a
// run needs one number beside its length, and the lengths here are 4, 8, .. of a lane and its
// neighbours, a round, a warp and a tile: their powers of decay come from the host. Sums from a
// round upwards are in double: few, and it is in the long chains that float32 would lose digits.
//
// The bits of a row depend on where in a tile it stands, so on what is packed before it, and on
// nothing else.
#pragma once

#include <cmath>

#include "scan.cuh"

namespace s2srm {

// A lane holds 2 * 4 * rounds values; more rounds would spill.
template <typename T>
using GaeShape = TileShape<512, sizeof(T) == 4 ? 4 : 2>;

template <typename T>
struct Decay {
  T row, lanes[5];           // powers 1; 4, 8, .. 64
  double round, warp, tile;  // power 128; the rows of a warp; of a tile

  Decay(double decay, int warp_rows, int tile_rows)
      : row(static_cast<T>(decay)),
        round(std::pow(decay, kRoundRows)),
        warp(std::pow(decay, warp_rows)),
        tile(std::pow(decay, tile_rows)) {
    for (int i = 0; i < 5; ++i) lanes[i] = static_cast<T>(std::pow(decay, kVector << i));
  }
};

template <typename T>
struct GaeArguments {
  const T* rewards;
  const T* values;
  const T* bootstrap;  // (B,) or null
  CuSeqlens cu_seqlens;
  int64_t num_sequences, num_rows, num_tiles;
  T gamma;
  Decay<T> decay;
  uint64_t* words;  // (num_tiles * Published<double>::kWords,), zeros
  T* advantages;
  T* returns;
};

// The A that enters `tile` from its successor: folded from the nearest tile that is final. By one
// whole warp. The last tile is final without waiting, and each becomes so after its successors, so
// this ends as long as blocks start in the order of their index.
template <typename T>
__device__ __forceinline__ double carry_from_successors(const GaeArguments<T>& in, int64_t tile,
                                                        int lane) {
  const int64_t seen = tile + 1 + lane;
  for (;;) {
    Published<double> found{kEmpty, 0.0};
    if (seen < in.num_tiles) found = Published<double>::read(in.words, seen);
    const unsigned final_lanes = __ballot_sync(kAllLanes, found.flag == kFinal);
    const unsigned empty_lanes = __ballot_sync(kAllLanes, found.flag == kEmpty);
    if (final_lanes != 0) {
      const int nearest = __ffs(final_lanes) - 1;
      if ((empty_lanes & lanes_below(nearest)) == 0) {
        double carry = __shfl_sync(kAllLanes, found.value, nearest);
        for (int i = nearest - 1; i >= 0; --i)
          carry = fma(in.decay.tile, carry, __shfl_sync(kAllLanes, found.value, i));
        return carry;
      }
    }
    __nanosleep(20);
  }
}

template <bool kWhole, typename T, int kRounds>
__device__ __forceinline__ void load_rounds(const T* rewards, const T* values, int lane_row,
                                            int num_rows, Four<T> (&delta)[kRounds],
                                            Four<T> (&value)[kRounds]) {
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    delta[r] = load_four<kWhole>(rewards, lane_row + r * kRoundRows, num_rows);
    value[r] = load_four<kWhole>(values, lane_row + r * kRoundRows, num_rows);
  }
}

template <typename T, int kThreads, int kRounds>
__global__ void __launch_bounds__(kThreads, 2) gae_kernel(const GaeArguments<T> in) {
  using Shape = TileShape<kThreads, kRounds>;
  __shared__ Marks<Shape::kRows> ends;
  __shared__ double warp_sum[Shape::kWarps];
  __shared__ bool warp_closed[Shape::kWarps];  // has an end, so that nothing flows through
  __shared__ double tile_carry;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t tile = in.num_tiles - 1 - blockIdx.x, begin = tile * Shape::kRows;
  const int lane_row = warp * Shape::kWarpRows + lane * kVector;  // of round 0, in the tile

  // 1. Every load that does not depend on another.
  Four<T> delta[kRounds], value[kRounds];
  const int num_rows = rows_from<Shape::kRows>(begin, in.num_rows);
  const T *rewards = in.rewards + begin, *values = in.values + begin;
  if (num_rows == Shape::kRows && is_aligned(rewards) && is_aligned(values))
    load_rounds<true>(rewards, values, lane_row, num_rows, delta, value);
  else
    load_rounds<false>(rewards, values, lane_row, num_rows, delta, value);
  const int warp_end = (warp + 1) * Shape::kWarpRows;
  T value_after = T(0);
  if (lane == kLanes - 1 && begin + warp_end < in.num_rows) value_after = values[warp_end];
  ends.template fill<Edge::last_row, kThreads>(in.cu_seqlens, in.num_sequences, begin, num_rows);

  // 2. Each round by itself: delta, and the sum from a lane's first row to the round's end.
  T sum[kRounds];
  unsigned closed_rounds = 0;  // with an end, by round
#pragma unroll
  for (int r = kRounds - 1; r >= 0; --r) {
    const int row = lane_row + r * kRoundRows;
    const unsigned bits = ends.nibble(row);
    T next = __shfl_down_sync(kAllLanes, value[r].values[0], 1);
    if (lane == kLanes - 1) next = value_after;
    value_after = __shfl_sync(kAllLanes, value[r].values[0], 0);
    T total = T(0);
#pragma unroll
    for (int j = kVector - 1; j >= 0; --j) {
      const bool is_end = bits >> j & 1u;
      if (is_end) next = in.bootstrap == nullptr ? T(0) : in.bootstrap[ends.sequence_at(row + j)];
      delta[r].values[j] = fma(in.gamma, next, delta[r].values[j]) - value[r].values[j];
      next = value[r].values[j];
      // Not a product with 0: what stands in another sequence may be infinite.
      total = is_end ? delta[r].values[j] : fma(in.decay.row, total, delta[r].values[j]);
    }
    const unsigned closed = __ballot_sync(kAllLanes, bits != 0);  // lanes with an end
    closed_rounds |= static_cast<unsigned>(closed != 0) << r;
#pragma unroll
    for (int i = 0; i < 5; ++i) {
      const int distance = 1 << i;
      const T right = __shfl_down_sync(kAllLanes, total, distance);
      const bool open = (closed >> lane & lanes_below(distance)) == 0;
      if (lane + distance < kLanes && open) total = fma(in.decay.lanes[i], right, total);
    }
    sum[r] = total;
  }

  // 3. The warp's sum, then the tile's, then the A that enters the tile.
  double total = 0;
#pragma unroll
  for (int r = kRounds - 1; r >= 0; --r) {
    const double round_sum = __shfl_sync(kAllLanes, sum[r], 0);
    total = closed_rounds >> r & 1u ? round_sum : fma(in.decay.round, total, round_sum);
  }
  if (lane == 0) {
    warp_sum[warp] = total;
    warp_closed[warp] = closed_rounds != 0;
  }
  __syncthreads();
  if (warp == 0) {
    total = 0;
    bool is_closed = tile == in.num_tiles - 1;
    for (int w = Shape::kWarps - 1; w >= 0; --w) {
      total = warp_closed[w] ? warp_sum[w] : fma(in.decay.warp, total, warp_sum[w]);
      is_closed = is_closed || warp_closed[w];
    }
    if (lane == 0) Published<double>::write(in.words, tile, is_closed ? kFinal : kPartial, total);
    double carry = 0;
    if (tile != in.num_tiles - 1) carry = carry_from_successors(in, tile, lane);
    if (lane == 0) {
      if (!is_closed)
        Published<double>::write(in.words, tile, kFinal, fma(in.decay.tile, carry, total));
      tile_carry = carry;
    }
  }
  __syncthreads();

  // 4. The A that enters the warp, the round, the lane; then the rows.
  double carry = tile_carry;
  for (int w = Shape::kWarps - 1; w > warp; --w)
    carry = warp_closed[w] ? warp_sum[w] : fma(in.decay.warp, carry, warp_sum[w]);
  T to_round_end = T(1);
#pragma unroll
  for (int i = 0; i < 5; ++i)
    if ((kLanes - 1 - lane) >> i & 1) to_round_end *= in.decay.lanes[i];
#pragma unroll
  for (int r = kRounds - 1; r >= 0; --r) {
    const int row = lane_row + r * kRoundRows;
    const unsigned bits = ends.nibble(row), closed = __ballot_sync(kAllLanes, bits != 0);
    T advantage = __shfl_down_sync(kAllLanes, sum[r], 1);
    if (lane == kLanes - 1) advantage = T(0);
    if (closed >> lane >> 1 == 0) advantage = fma(to_round_end, static_cast<T>(carry), advantage);
    Four<T> advantages, returns;
#pragma unroll
    for (int j = kVector - 1; j >= 0; --j) {
      const T own = delta[r].values[j];
      advantage = bits >> j & 1u ? own : fma(in.decay.row, advantage, own);
      advantages.values[j] = advantage;
      returns.values[j] = advantage + value[r].values[j];
    }
    store_four(in.advantages + begin, row, num_rows, advantages);
    store_four(in.returns + begin, row, num_rows, returns);
    const double round_sum = __shfl_sync(kAllLanes, sum[r], 0);
    carry = closed != 0 ? round_sum : fma(in.decay.round, carry, round_sum);
  }
}

}  // namespace s2srm
