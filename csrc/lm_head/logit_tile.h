// The logits of up to kTaskRows rows by one tile of columns, in the memory of one worker.
#pragma once

#include "packed_hidden.h"
#include "passes.h"

namespace s2srm::lm_head {

template <class T>
class LogitTile {
 public:
  LogitTile()
      : z_(kTaskRows * kTileColumns), weight_(kDepth * kTileColumns), bias_(kTileColumns) {}

  // z of a panel of the task.
  T* z(const TileKernels<T>& kernels, int64_t panel) const {
    return z_.get() + panel * kTileColumns * kernels.panel;
  }

  // Shares of the cap -> logits.
  void scale(const Head<T>& head, const TileKernels<T>& kernels, const PackedHidden<T>& hidden,
             int64_t first_panel, int64_t panels, int64_t columns) const {
    if (head.softcap == 0) return;
    for (int64_t p = 0; p < panels; ++p)
      kernels.scale_shares(columns, hidden.vectors(first_panel + p), head.softcap,
                           head.temperature, z(kernels, p));
  }

  // z of the first num_rows rows -> out[column * stride + row].
  template <class Wanted>
  void store(const TileKernels<T>& kernels, int64_t num_rows, int64_t columns,
             const Wanted& wanted, T* out, int64_t stride) const {
    for (int64_t r = 0; r < num_rows; r += kernels.panel)
      if (wanted(r / kernels.panel))
        kernels.copy_far(columns, std::min(kernels.panel, num_rows - r),
                         z(kernels, r / kernels.panel), kernels.panel, out + r, stride);
  }

  // Logits, or with softcap their shares of the cap, of `panels` panels from `first_panel` on and
  // `columns` columns from `first_column` on; panels that `wanted(panel of the task)` refuses are
  // left as they are.
  template <class Wanted>
  void compute(const Head<T>& head, const TileKernels<T>& kernels, const PackedHidden<T>& hidden,
               int64_t first_panel, int64_t panels, int64_t first_column, int64_t columns,
               const Wanted& wanted) {
    int64_t k = 0;
    do {  // once for a width of 0
      const int64_t depth = std::min(kDepth, head.width - k);
      int64_t stride = head.weight_stride;
      const T* weight = block(head, first_column, columns, k, depth, stride);
      Prefetch prefetch = next_block(head, first_column, columns, k + kDepth);
      prefetch.spread(panels * (columns / kernels.block_rows));
      for (int64_t p = 0; p < panels; ++p)
        if (wanted(p))
          kernels.product(columns, depth, head.run(head.width), hidden.vectors(first_panel + p),
                          weight, stride, hidden.at(first_panel + p, k), z(kernels, p),
                          kernels.panel, k > 0, prefetch);
      k += kDepth;
    } while (k < head.width);
    if (head.plain()) return;
    if (head.bias != nullptr) read(head.element, head.bias, first_column, columns, bias_.get());
    for (int64_t p = 0; p < panels; ++p)
      if (wanted(p))
        kernels.finish_logits(columns, hidden.vectors(first_panel + p),
                              head.bias == nullptr ? nullptr : bias_.get(), head.softcap,
                              head.temperature, z(kernels, p));
  }

 private:
  // The rest of the tile's weight, or the beginning of the next tile's.
  static Prefetch next_block(const Head<T>& head, int64_t first_column, int64_t columns,
                             int64_t k) {
    if (k >= head.width) {
      k = 0;
      first_column += columns;
    }
    Prefetch prefetch;
    prefetch.add(head.weight_at(first_column, k), head.weight_stride * head.element_size(),
              std::min(columns, head.num_columns - first_column),
              std::min(kDepth, head.width - k) * head.element_size());
    return prefetch;
  }

  // The weight's own memory where it is of type T, a converted copy where it is not.
  const T* block(const Head<T>& head, int64_t first_column, int64_t columns, int64_t k,
                 int64_t depth, int64_t& stride) {
    if (head.element == Element::kCompute)
      return static_cast<const T*>(head.weight) + first_column * stride + k;
    for (int64_t c = 0; c < columns; ++c)
      read(head.element, head.weight, (first_column + c) * stride + k, depth,
           weight_.get() + c * kDepth);
    stride = kDepth;
    return weight_.get();
  }

  Buffer<T> z_, weight_, bias_;
};

}  // namespace s2srm::lm_head
