// Live rows of hidden, widened and packed for the products over the width.
#pragma once

#include "head.h"
#include "simd/kernels.h"
#include "workers.h"

namespace s2srm::lm_head {

// Rows of hidden as the right-hand side of a product over the width: panel after panel, in each
// packed[k * panel + row], zeros behind the last row.
template <class T>
class PackedHidden {
 public:
  PackedHidden(const Head<T>& head, const TileKernels<T>& kernels, int64_t capacity)
      : head_(head),
        kernels_(kernels),
        data_(ceil_div(capacity, kernels.panel) * kernels.panel * head.width) {}

  // The most rows, a multiple of kBlockRows, to hold at once.
  static int64_t capacity(const Head<T>& head) {
    constexpr int64_t bytes = 8 << 20, most = 2048;
    const int64_t fitting = bytes / (std::max<int64_t>(head.width, 1) * sizeof(T));
    const int64_t rows = std::clamp(fitting, kBlockRows, most) / kBlockRows * kBlockRows;
    return std::min(rows, head.num_rows);
  }

  void pack(int64_t first_row, int64_t num_rows) {
    first_row_ = first_row;
    num_rows_ = num_rows;
    for_each_task(ceil_div(num_rows, kernels_.panel),
                  [&](int64_t, int64_t panel) { pack_panel(panel); });
  }

  int64_t num_rows() const { return num_rows_; }
  int64_t num_panels() const { return ceil_div(num_rows_, kernels_.panel); }
  // Real rows in a panel, and the vectors that hold them.
  int64_t rows(int64_t panel) const {
    return std::min(kernels_.panel, num_rows_ - panel * kernels_.panel);
  }
  int64_t vectors(int64_t panel) const { return ceil_div(rows(panel), kernels_.lanes); }
  const T* at(int64_t panel, int64_t k) const {
    return data_.get() + (panel * head_.width + k) * kernels_.panel;
  }

 private:
  void pack_panel(int64_t panel) {
    constexpr int64_t step = 64;
    const int64_t used = rows(panel), width = vectors(panel) * kernels_.lanes;
    T* out = data_.get() + panel * head_.width * kernels_.panel;
    T buffer[step];
    for (int64_t k = 0; k < head_.width; k += step) {
      const int64_t length = std::min(step, head_.width - k);
      for (int64_t r = 0; r < width; ++r) {
        if (r < used) {
          const int64_t row = head_.rows[first_row_ + panel * kernels_.panel + r];
          read(head_.element, head_.hidden, row * head_.hidden_stride + k, length, buffer);
        } else {
          std::fill_n(buffer, length, T(0));
        }
        for (int64_t i = 0; i < length; ++i) out[(k + i) * kernels_.panel + r] = buffer[i];
      }
    }
  }

  const Head<T>& head_;
  const TileKernels<T>& kernels_;
  Buffer<T> data_;
  int64_t first_row_ = 0, num_rows_ = 0;
};

}  // namespace s2srm::lm_head
