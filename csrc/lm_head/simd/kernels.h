// What one instruction set offers for a tile of logits, behind plain function pointers.
//
// A tile is up to kTileColumns columns of the vocabulary by one panel of rows, stored column after
// column: z[column * stride + row]. Rows lie side by side in the vector lanes, so every statistic
// of a row is a vertical operation and a row never learns which other rows are in its panel: its
// bits are the same in any batch. Nothing here knows of torch, threads or element types other than
// float and double.
#pragma once

#include <cstdint>

#include "../prefetch.h"

namespace s2srm::lm_head {

inline constexpr int64_t kTileColumns = 256;  // also the width of a block that may be skipped
inline constexpr int64_t kBlockRows = 128;    // the height of a block that may be skipped
inline constexpr int64_t kDepth = 128;        // the most terms of a sum in one call
inline constexpr int64_t kMaxPanel = 64;      // rows of the widest panel

// Elements for a packed left-hand side: blocks of at most 8 rows.
constexpr int64_t packed_size(int64_t rows, int64_t depth) { return (rows + 8) * depth; }

// Running statistics of a panel, each an array of rows, `stride` elements apart.
enum Statistic { kMax, kRest, kExpShift, kShift, kArgmax, kAbove, kNumStatistics };

// Statistics that are computed on demand; the sum is always there.
enum Wanted : int { kWantedCounts = 1, kWantedEntropy = 2, kWantedMean = 4, kWantedAll = 7 };

// What the gradients of a row's logits depend on, each an array of rows:
//
//     dz = e^(z - max_logit) * (linear - entropic * (z - max_logit - log_sum + entropy)) + uniform
//
// with 1 / sum e^(z - max_logit) and 1 / temperature in the factors, and times softcap's slope.
template <class T>
struct RowCoefficients {
  const T *max_logit, *linear, *uniform;
  const T *entropic, *log_sum, *entropy;  // null where entropic is 0 in every row
  T softcap;                              // 0: none
  T temperature;
};

template <class T>
struct TileKernels {
  const char* name;
  int64_t lanes;       // rows in a vector
  int64_t panel;       // rows in a panel, a multiple of lanes that divides kBlockRows
  int64_t block_rows;  // rows of the block of sums that a product keeps in registers

  // c[i][j] (+)= sum over k < depth of a[i * a_stride + k] * b[k * panel + j]
  // for i < rows and j < vectors * lanes, in the order of k: `run` terms at a time are summed in
  // registers, then added to c.
  void (*product)(int64_t rows, int64_t depth, int64_t run, int64_t vectors, const T* a,
                  int64_t a_stride, const T* b, T* c, int64_t c_stride, bool accumulate,
                  Prefetch& prefetch);

  // The same with a packed by pack_transposed.
  void (*product_packed)(int64_t rows, int64_t depth, int64_t run, int64_t vectors, const T* a,
                         const T* b, T* c, int64_t c_stride, bool accumulate,
                         Prefetch& prefetch);

  // a[k * a_stride + i] for i < rows and k < depth -> packed_size(rows, depth) elements.
  void (*pack_transposed)(int64_t rows, int64_t depth, const T* a, int64_t a_stride, T* out);

  // Products -> logits (z + bias) / temperature in place; with softcap -> shares of the cap,
  // tanh((z + bias) / softcap), from which its slope can be had without loss. bias may be null.
  void (*finish_logits)(int64_t columns, int64_t vectors, const T* bias, T softcap, T temperature,
                        T* z);

  // Shares of the cap -> logits, share * softcap / temperature, in place.
  void (*scale_shares)(int64_t columns, int64_t vectors, T softcap, T temperature, T* z);

  // Statistics of the tile whose first column is `first_column`, merged behind those in `state`
  // of `merged` columns (0: state is overwritten). wanted: of Wanted; what is not stays finite.
  // target_logits: (panel) to count logits above, or null. own: (kNumStatistics, panel) the tile's
  // own, or null.
  void (*statistics)(int64_t columns, int64_t vectors, const T* z, int wanted,
                     const T* target_logits, int64_t first_column, int64_t merged, T* state,
                     int64_t stride, T* own);

  // state of `merged` columns, then later, of `added` columns -> state.
  void (*merge)(int64_t vectors, int64_t merged, T* state, int64_t added, const T* later,
                int64_t stride);

  // The largest z + noise of `rows` rows of a panel, in the order of the columns after what `best`
  // holds: (3, stride) perturbed logit, logit and column. seeds and positions (rows), or null for
  // no noise; first_id: the first column's in the whole vocabulary; suppressed: by column, or null.
  void (*draw)(int64_t columns, int64_t rows, const T* z, const int64_t* seeds,
               const int64_t* positions, int64_t first_id, int64_t first_column,
               const bool* suppressed, T* best, int64_t stride);

  // Logits, with softcap shares, z[column * stride + row] -> gradients of the products in place, by
  // the closed form of s2srm_kernels/lm_head/backward.py; the target's entry is not special.
  void (*gradients)(int64_t columns, int64_t vectors, const RowCoefficients<T>& rows, T* z,
                    int64_t stride);

  // out[i * out_stride + j] = in[i * in_stride + j] for j < width, past the caches where that can
  // be: for what is not read again soon.
  void (*copy_far)(int64_t count, int64_t width, const T* in, int64_t in_stride, T* out,
                   int64_t out_stride);

  // For tests: the noise of one row, elementwise exp and tanh.
  void (*noise)(int64_t seed, int64_t position, int64_t first_id, int64_t count, float* out);
  void (*exp)(int64_t count, const T* x, T* y);
  void (*tanh)(int64_t count, const T* x, T* y);
};

// The best that this processor can run, or the named one; null if there is no such.
template <class T>
const TileKernels<T>* tile_kernels(const char* name = nullptr);

}  // namespace s2srm::lm_head
