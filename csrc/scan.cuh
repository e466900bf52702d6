// What the two segmented scans on CUDA share: tiles of rows, the sequences that begin or end in
// one, and the carry from tile to tile.
//
// One kernel reads each row once and writes it once. A block scans a tile of rows, publishes what
// the tile contributes to its successor, and takes its own carry from its predecessors' words
// ("decoupled look-back", Merrill and Garland, NVIDIA NVR-2016-002). Two things differ from it:
//
//   * A published word carries its flag beside its value in the same aligned 64 bits, so that
//     neither fences nor a second array are needed (as NCCL's LL protocol does).
//   * Contributions are folded one tile after the other in the order of the tiles, from wherever
//     the nearest finished carry stands. The carry of a tile is then the same bits whatever the
//     timing was, which composing them in any other order would not give.
//
// Rows of a tile: warp w, round r, lane l, element j is row ((w * rounds + r) * 32 + l) * 4 + j, so
// that every access of a warp is 32 adjacent pieces of 16 bytes.
//
// No torch in here: tests compile the kernels for the host as well.
#pragma once

#include <cstdint>

#include "cu_seqlens.h"

namespace s2srm {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kLanes = 32;
constexpr int kVector = 4;                    // rows of a lane in a round
constexpr int kRoundRows = kLanes * kVector;  // rows of a warp in a round

// How many rows of a tile there are: all but at the end.
template <int kRows>
__device__ __forceinline__ int rows_from(int64_t begin, int64_t num_rows) {
  return static_cast<int>(num_rows - begin < kRows ? num_rows - begin : kRows);
}

template <int kBlockThreads, int kWarpRounds>
struct TileShape {
  static constexpr int kThreads = kBlockThreads, kRounds = kWarpRounds;
  static constexpr int kWarps = kThreads / kLanes;
  static constexpr int kWarpRows = kRoundRows * kRounds;
  static constexpr int kRows = kWarpRows * kWarps;
};

__device__ __forceinline__ unsigned lanes_below(int lane) { return (1u << lane) - 1u; }

__device__ __forceinline__ int highest_bit(unsigned mask) { return 31 - __clz(mask); }

// --- loads and stores of four rows ---

struct alignas(16) Piece {
  uint32_t words[4];
};

template <typename T>
__device__ __forceinline__ bool is_aligned(const T* data) {
  return reinterpret_cast<uintptr_t>(data) % sizeof(Piece) == 0;
}

template <typename T>
union Four {
  T values[kVector];
  Piece pieces[kVector * sizeof(T) / sizeof(Piece)];
};

// `data` and `row` are the tile's, `num_rows` how many rows it has. kWhole: data is aligned and the
// four rows are there; otherwise rows beyond num_rows read as 0, and a slice may begin anywhere. A
// kernel decides for its whole tile, so that no branch parts its loads.
template <bool kWhole, typename T>
__device__ __forceinline__ Four<T> load_four(const T* data, int row, int num_rows) {
  Four<T> four;
  if constexpr (kWhole) {
    const Piece* source = reinterpret_cast<const Piece*>(data + row);
#pragma unroll
    for (int i = 0; i < int(sizeof(four) / sizeof(Piece)); ++i) four.pieces[i] = source[i];
  } else {
#pragma unroll
    for (int j = 0; j < kVector; ++j) four.values[j] = row + j < num_rows ? data[row + j] : T(0);
  }
  return four;
}

// To memory of our own, which is aligned.
template <typename T>
__device__ __forceinline__ void store_four(T* data, int row, int num_rows, const Four<T>& four) {
  if (row + kVector <= num_rows) {
    Piece* target = reinterpret_cast<Piece*>(data + row);
#pragma unroll
    for (int i = 0; i < int(sizeof(four) / sizeof(Piece)); ++i) target[i] = four.pieces[i];
  } else {
#pragma unroll
    for (int j = 0; j < kVector; ++j)
      if (row + j < num_rows) data[row + j] = four.values[j];
  }
}

// --- the sequences of a tile ---

// The first i in [0, count] with cu[i] >= row, by a whole warp: 32 probes at a time. Whatever cu
// holds, it ends and reads nothing outside [0, count).
__device__ __forceinline__ int64_t first_at_or_after(CuSeqlens cu, int64_t count, int64_t row,
                                                     int lane) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t step = (high - low + kLanes - 1) / kLanes;
    const int64_t probe = low + step * (lane + 1) - 1;
    const int num_below = __popc(__ballot_sync(kAllLanes, probe < high && cu[probe] < row));
    const int64_t above = low + step * (num_below + 1) - 1;
    low += step * num_below;
    high = above < high ? above : high;
  }
  return low;
}

enum class Edge { first_row, last_row };

// One bit for every row of the tile that is its sequence's first (or last) row, and which sequence.
template <int kRows>
struct Marks {
  uint32_t bits[kRows / 32];
  int32_t sequence[kRows];  // at marked rows: relative to `first`
  int64_t first, last;      // the range of sequences that may be marked here

  // The bits of the four rows from `row`.
  __device__ __forceinline__ unsigned nibble(int row) const {
    return bits[row / 32] >> (row % 32) & 0xfu;
  }

  __device__ __forceinline__ int64_t sequence_at(int row) const { return first + sequence[row]; }

  // By a whole block; every thread may read the marks afterwards. Nothing is written outside the
  // tile, whatever cu holds.
  template <Edge kEdge, int kThreads>
  __device__ __forceinline__ void fill(CuSeqlens cu, int64_t num_sequences, int64_t begin,
                                       int num_rows) {
    static_assert(kThreads >= 2 * kLanes);
    constexpr int64_t kShift = kEdge == Edge::last_row ? 1 : 0;  // a last row r: cu[b + 1] == r + 1
    const int thread = threadIdx.x, lane = thread % kLanes, warp = thread / kLanes;
    for (int i = thread; i < kRows / 32; i += kThreads) bits[i] = 0;
    if (warp < 2) {
      const int64_t row = begin + (warp == 0 ? 0 : num_rows) + kShift;
      const int64_t found = first_at_or_after(cu, num_sequences + 1, row, lane) - kShift;
      if (lane == 0) (warp == 0 ? first : last) = found;
    }
    __syncthreads();
    const int64_t stop = last < num_sequences ? last : num_sequences;
    for (int64_t b = (first > 0 ? first : 0) + thread; b < stop; b += kThreads) {
      const int64_t start = cu[b], next = cu[b + 1];
      const int64_t row = (kEdge == Edge::last_row ? next - 1 : start) - begin;
      if (start < next && row >= 0 && row < kRows) {
        atomicOr(&bits[row / 32], 1u << (row % 32));
        sequence[row] = static_cast<int32_t>(b - first);
      }
    }
    __syncthreads();
  }
};

// --- the words between tiles ---

enum : uint32_t { kEmpty = 0, kPartial = 1, kFinal = 2 };

// The published words of a tile: 32 bits of value and 32 of flag each. A double takes two words; a
// reader that finds different flags in them has come between the writes and counts them as empty.
template <typename T>
struct Published {
  static constexpr int kWords = sizeof(T) / sizeof(uint32_t);
  uint32_t flag;
  T value;

  __device__ __forceinline__ static void write(volatile uint64_t* words, int64_t tile,
                                               uint32_t flag, T value) {
    uint32_t halves[kWords];
    memcpy(halves, &value, sizeof(T));
#pragma unroll
    for (int i = 0; i < kWords; ++i)
      words[tile * kWords + i] = static_cast<uint64_t>(flag) << 32 | halves[i];
  }

  __device__ __forceinline__ static Published read(const volatile uint64_t* words, int64_t tile) {
    Published found;
    uint32_t halves[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const uint64_t word = words[tile * kWords + i];
      const uint32_t flag = static_cast<uint32_t>(word >> 32);
      halves[i] = static_cast<uint32_t>(word);
      found.flag = i == 0 || flag == found.flag ? flag : kEmpty;
    }
    memcpy(&found.value, halves, sizeof(T));
    return found;
  }
};

}  // namespace s2srm
