// The columns that gradients are made for at a time, as their three phases see them.
#pragma once

#include "passes.h"
#include "workers.h"

namespace s2srm::lm_head {

// The logits, then dz, of columns [first, first + columns): logits[column * stride + row].
template <class T>
struct ColumnSpan {
  const Head<T>& head;
  const TileKernels<T>& kernels;
  const Coefficients<T>& coefficients;
  const Outputs<T>& outputs;
  int64_t stride;
  T* logits = nullptr;
  int64_t first = 0, columns = 0;

  int64_t num_tiles() const { return ceil_div(columns, kTileColumns); }
  int64_t tile_columns(int64_t tile) const {
    return std::min(kTileColumns, columns - tile * kTileColumns);
  }
  T* tile_logits(int64_t tile) const { return logits + tile * kTileColumns * stride; }
  bool kept(int64_t row, int64_t tile) const {
    return coefficients.kept == nullptr ||
           coefficients
               .kept[row / kBlockRows * coefficients.kept_stride + first / kTileColumns + tile];
  }
  int64_t width_panels() const { return ceil_div(head.width, kernels.panel); }
  // Real elements in a panel of the width.
  int64_t panel_width(int64_t panel) const {
    return std::min(kernels.panel, head.width - panel * kernels.panel);
  }
};

// `depth` rows of `length` elements -> a panel, zeros behind them.
template <class T>
void pack_rows(const TileKernels<T>& kernels, Element element, const void* base, int64_t offset,
               int64_t stride, int64_t depth, int64_t length, T* out) {
  for (int64_t k = 0; k < depth; ++k, out += kernels.panel) {
    read(element, base, offset + k * stride, length, out);
    std::fill(out + length, out + kernels.panel, T(0));
  }
}

}  // namespace s2srm::lm_head
