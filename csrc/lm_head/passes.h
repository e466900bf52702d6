// The passes over the vocabulary: what bindings.cpp calls.
#pragma once

#include "draws.h"
#include "head.h"
#include "simd/kernels.h"

namespace s2srm::lm_head {

inline constexpr int64_t kPackedStatistics = 7;
inline constexpr int64_t kTaskRows = 2 * kBlockRows;  // the most that a worker takes at a time

// out (num_rows): each row's logit at its target, the same bits as in `statistics`; -inf without
// one.
template <class T>
void target_logits(const Head<T>& head, const TileKernels<T>& kernels, T* out);

// packed (num_rows, 7) as in Engine.statistics; target_logits (num_rows) or null; tile_lse
// (num_rows, ceil(num_columns / kTileColumns)) or null; wanted: of Wanted; logits or null: column c
// of row r goes to logits[c * logits_stride + r], with softcap its share of the cap; draws or null.
template <class T>
void statistics(const Head<T>& head, const TileKernels<T>& kernels, const T* target_logits,
                int wanted, T* packed, T* tile_lse, T* logits, int64_t logits_stride,
                const Draws<T>* draws = nullptr);

// (num_rows) each; null is zero, of `kept` everything.
template <class T>
struct Coefficients {
  const T *max_logit, *log_sum, *log_sum_low, *entropy;
  const T *d_logprobs, *d_entropy, *d_lse, *d_mean_logprob;
  int64_t num_total;
  const bool* kept;  // blocks: [row / kBlockRows * kept_stride + column / kTileColumns]
  int64_t kept_stride;
  // Gradients that are known already, num_entries a row: entry_values stand in place of what the
  // formula gives at entry_columns, -1 where there is no such column here.
  int64_t num_entries;
  const int64_t* entry_columns;
  const T* entry_values;
};

// Null: not needed. hidden (N, width): live rows are written, the others left alone. weight
// (num_columns, width) and bias are added to where `accumulate`.
template <class T>
struct Outputs {
  T* hidden;
  void* weight;
  Element weight_element;
  T* bias;
  bool accumulate;
};

// Columns are taken `columns` at a time: a multiple of kTileColumns, or a divisor of it. logits
// (columns, logits_stride) is room for as many; with `stored` it holds all columns, as `statistics`
// left them, and may be the memory of outputs.weight, whose width it then has for a stride.
template <class T>
void gradients(const Head<T>& head, const TileKernels<T>& kernels,
               const Coefficients<T>& coefficients, T* logits, int64_t logits_stride,
               int64_t columns, bool stored, const Outputs<T>& outputs);

}  // namespace s2srm::lm_head
