// The largest perturbed logit of every row, found in the statistics' pass over the vocabulary.
#pragma once

#include <limits>

#include "simd/kernels.h"
#include "workers.h"

namespace s2srm::lm_head {

// What a call draws, and where the result goes. seeds and positions (num_rows) or null for no
// noise; suppressed (num_columns) or null; first_id: the first column's in the whole vocabulary.
template <class T>
struct Draws {
  const int64_t* seeds;
  const int64_t* positions;
  int64_t first_id;
  const bool* suppressed;
  T* perturbed;      // (num_rows), -inf where every column is suppressed
  T* logits;         // of the column drawn, `logits_stride` apart
  int64_t logits_stride;
  int64_t* columns;  // (num_rows)
};

// One group of rows, from first_row on, each split of the columns on its own.
template <class T>
class DrawGroup {
 public:
  DrawGroup(const Draws<T>& draws, int64_t first_row, int64_t splits, int64_t stride)
      : draws_(draws), first_row_(first_row), splits_(splits), stride_(stride),
        best_(splits * 3 * stride) {
    for (int64_t s = 0; s < splits; ++s) {
      std::fill_n(best(s), 2 * stride, -std::numeric_limits<T>::infinity());
      std::fill_n(best(s) + 2 * stride, stride, T(0));
    }
  }

  // A tile of `rows` rows from the group's row `at` on, its columns in order within a split.
  void add(const TileKernels<T>& kernels, int64_t split, int64_t at, int64_t rows,
           int64_t first_column, int64_t columns, const T* z) const {
    const int64_t row = first_row_ + at;
    const bool noisy = draws_.seeds != nullptr;
    kernels.draw(columns, rows, z, noisy ? draws_.seeds + row : nullptr,
                 noisy ? draws_.positions + row : nullptr, draws_.first_id + first_column,
                 first_column, draws_.suppressed, best(split) + at, stride_);
  }

  // Of equal maxima the first split keeps the column.
  void finish(int64_t at) const {
    const T* found = best(0) + at;
    for (int64_t s = 1; s < splits_; ++s)
      if (best(s)[at] > *found) found = best(s) + at;
    const int64_t row = first_row_ + at;
    draws_.perturbed[row] = found[0];
    draws_.logits[row * draws_.logits_stride] = found[stride_];
    draws_.columns[row] = static_cast<int64_t>(found[2 * stride_]);
  }

 private:
  T* best(int64_t split) const { return best_.get() + split * 3 * stride_; }

  const Draws<T>& draws_;
  const int64_t first_row_, splits_, stride_;
  Buffer<T> best_;
};

}  // namespace s2srm::lm_head
