// d_weight = dz X and d_bias, the sums of dz, of the columns of a span: over the rows in their
// order, a tile at a time, written once.
#pragma once

#include <vector>

#include "column_span.h"

namespace s2srm::lm_head {

template <class T>
class WeightGradient {
 public:
  // in_place: the logits lie in the memory of d_weight.
  WeightGradient(const ColumnSpan<T>& span, bool in_place) : span_(span), in_place_(in_place) {
    const int64_t copied = in_place ? kTileColumns * span.head.num_rows : 0;
    for (int64_t i = 0; i < num_workers(); ++i) tiles_.emplace_back(copied);
  }

  void run() {
    // A task is a whole tile, whose dz then stays near, unless that leaves workers idle.
    const int64_t panels = span_.width_panels(), tiles = span_.num_tiles();
    const bool whole = in_place_ || panels < 2 || span_.outputs.weight == nullptr ||
                       tiles >= 4 * num_workers();
    const int64_t parts = whole ? 1 : panels;
    for_each_task(tiles * parts, [&](int64_t worker, int64_t task) {
      const int64_t tile = task / parts, part = task % parts;
      if (part == 0 && span_.outputs.bias != nullptr) sum_bias(tile);
      if (span_.outputs.weight == nullptr) return;
      const Left left = prepare(tile, tiles_[worker]);
      for (int64_t p = part; p < (whole ? panels : part + 1); ++p)
        run_panel(tile, p, left, p == part, tiles_[worker]);
    });
  }

 private:
  struct Tile {
    Buffer<T> right{kDepth * kMaxPanel}, sums{kTileColumns * kMaxPanel}, copy;
    explicit Tile(int64_t copied) : copy(copied) {}
  };
  struct Left {
    const T* dz;
    int64_t stride;
  };

  // dz of a tile, copied where the tile's d_weight is about to take its place.
  Left prepare(int64_t tile, Tile& scratch) const {
    const T* dz = span_.tile_logits(tile);
    if (!in_place_) return {dz, span_.stride};
    const int64_t rows = span_.head.num_rows;
    for (int64_t c = 0; c < span_.tile_columns(tile); ++c)
      std::copy_n(dz + c * span_.stride, rows, scratch.copy.get() + c * rows);
    return {scratch.copy.get(), rows};
  }

  // One panel of the width. `fresh`: dz of the tile is still far.
  void run_panel(int64_t tile, int64_t panel, const Left& left, bool fresh, Tile& scratch) const {
    const auto& head = span_.head;
    const auto& kernels = span_.kernels;
    const int64_t length = span_.panel_width(panel), columns = span_.tile_columns(tile);
    T *sums = scratch.sums.get(), *right = scratch.right.get();
    bool some = false;
    for (int64_t r = 0; r < head.num_rows; r += kBlockRows) {
      if (!span_.kept(r, tile)) continue;
      const int64_t depth = std::min(kBlockRows, head.num_rows - r);
      for (int64_t k = 0; k < depth; ++k)
        pack_rows(kernels, head.element, head.hidden,
                  head.rows[r + k] * head.hidden_stride + panel * kernels.panel, 0, 1, length,
                  right + k * kernels.panel);
      Prefetch prefetch = next_block(tile, panel, r + kBlockRows, left, fresh && !in_place_);
      prefetch.spread(columns / kernels.block_rows);
      kernels.product(columns, depth, head.run(head.num_rows), ceil_div(length, kernels.lanes),
                      left.dz + r, left.stride,
                      right, sums, kernels.panel, some, prefetch);
      some = true;
    }
    if (!some) std::fill_n(sums, columns * kernels.panel, T(0));
    write_panel(tile, panel, sums);
  }

  // The next rows of hidden and of dz; behind the last row d_weight, if it is read.
  Prefetch next_block(int64_t tile, int64_t panel, int64_t row, const Left& left,
                      bool fresh) const {
    const auto& head = span_.head;
    const int64_t from = panel * span_.kernels.panel, length = span_.panel_width(panel);
    Prefetch prefetch;
    if (row >= head.num_rows) {
      if (span_.outputs.accumulate)
        prefetch.add(static_cast<T*>(span_.outputs.weight) +
                      (span_.first + tile * kTileColumns) * head.width + from,
                  head.width * sizeof(T), span_.tile_columns(tile), length * sizeof(T));
      return prefetch;
    }
    const int64_t depth = std::min(kBlockRows, head.num_rows - row);
    prefetch.add(head.hidden_at(head.rows[row], from), head.hidden_stride * head.element_size(),
              depth, length * head.element_size());
    if (fresh)
      prefetch.add(left.dz + row, left.stride * sizeof(T), span_.tile_columns(tile),
                depth * sizeof(T));
    return prefetch;
  }

  void write_panel(int64_t tile, int64_t panel, T* sums) const {
    const auto& outputs = span_.outputs;
    const int64_t step = span_.kernels.panel, length = span_.panel_width(panel);
    const int64_t columns = span_.tile_columns(tile), width = span_.head.width;
    const int64_t place = (span_.first + tile * kTileColumns) * width + panel * step;
    if (outputs.accumulate) {
      T* total = static_cast<T*>(outputs.weight) + place;
      for (int64_t c = 0; c < columns; ++c)
        for (int64_t i = 0; i < length; ++i) total[c * width + i] += sums[c * step + i];
    } else if (outputs.weight_element == Element::kCompute) {
      span_.kernels.copy_far(columns, length, sums, step, static_cast<T*>(outputs.weight) + place,
                             width);
    } else {
      for (int64_t c = 0; c < columns; ++c)
        write(outputs.weight_element, sums + c * step, length, outputs.weight, place + c * width);
    }
  }

  void sum_bias(int64_t tile) const {
    constexpr int64_t lanes = 16;
    for (int64_t c = 0; c < span_.tile_columns(tile); ++c) {
      const T* dz = span_.tile_logits(tile) + c * span_.stride;
      T sums[lanes] = {}, total = 0;
      for (int64_t r = 0; r < span_.head.num_rows; r += lanes) {
        if (!span_.kept(r, tile)) continue;  // kBlockRows is a multiple of lanes
        for (int64_t i = 0; i < std::min(lanes, span_.head.num_rows - r); ++i) sums[i] += dz[r + i];
      }
      for (T sum : sums) total += sum;
      T* out = span_.outputs.bias + span_.first + tile * kTileColumns + c;
      *out = span_.outputs.accumulate ? *out + total : total;
    }
  }

  const ColumnSpan<T>& span_;
  const bool in_place_;
  std::vector<Tile> tiles_;
};

}  // namespace s2srm::lm_head
