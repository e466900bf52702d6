// d_hidden += dz^T W over the columns of a span, in their order.
#pragma once

#include <limits>
#include <utility>
#include <vector>

#include "column_span.h"

namespace s2srm::lm_head {

template <class T>
class HiddenGradient {
 public:
  explicit HiddenGradient(const ColumnSpan<T>& span) : span_(span), tiles_(num_workers()) {}

  void add() {
    const auto [rows, panels] = task_size();
    const int64_t all = span_.width_panels(), parts = ceil_div(all, panels);
    for_each_task(ceil_div(span_.head.num_rows, rows) * parts, [&](int64_t worker, int64_t task) {
      const int64_t panel = task % parts * panels, row = task / parts * rows;
      run({row, std::min(rows, span_.head.num_rows - row), panel, std::min(panels, all - panel)},
          tiles_[worker]);
    });
  }

 private:
  static constexpr int64_t kTaskWidth = 10 * kMaxPanel;
  static constexpr int64_t kPackedBlock = packed_size(kBlockRows, kDepth);

  struct Tile {
    Buffer<T> left{kTaskRows / kBlockRows * kPackedBlock}, right{kDepth * kMaxPanel};
    Buffer<T> sums{kTaskRows * kTaskWidth};
  };
  struct Part {  // of d_hidden: rows by panels of the width
    int64_t row, rows, panel, panels;
  };

  // Rows and panels of the width of a task: those of the shortest way through all tasks. Beside the
  // products, a task packs the weight once for all of its rows, which costs as much as kWeight
  // rows, and dz once for all of its panels, which costs as much as kGradient panels.
  std::pair<int64_t, int64_t> task_size() const {
    constexpr double kWeight = 9, kGradient = 0.3;
    const int64_t num_rows = span_.head.num_rows, all = span_.width_panels();
    const int64_t workers = num_workers(), fewest = ceil_div(num_rows, kTaskRows);
    const int64_t unit = span_.coefficients.kept == nullptr ? 1 : kBlockRows;
    std::pair<int64_t, int64_t> best;
    double best_cost = std::numeric_limits<double>::infinity();
    for (int64_t parts = ceil_div(all * span_.kernels.panel, kTaskWidth); parts <= all; ++parts)
      for (int64_t splits = fewest; splits <= fewest * workers; ++splits) {
        const int64_t panels = ceil_div(all, parts);
        const int64_t rows = ceil_div(ceil_div(num_rows, splits), unit) * unit;
        const int64_t tasks = ceil_div(num_rows, rows) * ceil_div(all, panels);
        const double cost =
            ceil_div(tasks, workers) * (panels * (rows + kWeight) + kGradient * rows);
        if (cost < best_cost) {
          best_cost = cost;
          best = {rows, panels};
        }
      }
    return best;
  }

  void run(const Part& part, Tile& tile) const {
    const auto& head = span_.head;
    const int64_t panel = span_.kernels.panel, stride = part.panels * panel;
    const int64_t from = part.panel * panel, length = std::min(stride, head.width - from);
    T* sums = tile.sums.get();
    const auto out = [&](int64_t r) {
      return span_.outputs.hidden + head.rows[part.row + r] * head.width + from;
    };
    for (int64_t r = 0; r < part.rows; ++r) {
      std::fill_n(sums + r * stride, stride, T(0));
      if (span_.first > 0) std::copy_n(out(r), length, sums + r * stride);
    }
    for (int64_t c = 0; c < span_.columns; c += kDepth) add_block(part, c, tile);
    for (int64_t r = 0; r < part.rows; ++r) std::copy_n(sums + r * stride, length, out(r));
  }

  // kDepth columns; blocks of rows that are not kept are left out.
  void add_block(const Part& part, int64_t column, Tile& tile) const {
    const auto& head = span_.head;
    const auto& kernels = span_.kernels;
    const int64_t panel = kernels.panel, depth = std::min(kDepth, span_.columns - column);
    const auto wanted = [&](int64_t r) {
      return span_.kept(part.row + r, column / kTileColumns);
    };
    const auto left = [&](int64_t r) { return tile.left.get() + r / kBlockRows * kPackedBlock; };
    bool some = false;
    for (int64_t r = 0; r < part.rows; r += kBlockRows) {
      if (!wanted(r)) continue;
      kernels.pack_transposed(std::min(kBlockRows, part.rows - r), depth,
                              span_.logits + column * span_.stride + part.row + r, span_.stride,
                              left(r));
      some = true;
    }
    if (!some) return;
    Prefetch prefetch = next_block(part, column + depth);
    for (int64_t p = 0; p < part.panels; ++p) {
      const int64_t length = span_.panel_width(part.panel + p);
      pack_rows(kernels, head.element, head.weight,
                (span_.first + column) * head.weight_stride + (part.panel + p) * panel,
                head.weight_stride, depth, length, tile.right.get());
      for (int64_t r = 0; r < part.rows; r += kBlockRows)
        if (wanted(r))
          kernels.product_packed(std::min(kBlockRows, part.rows - r), depth,
                                 head.run(head.num_columns), ceil_div(length, kernels.lanes),
                                 left(r), tile.right.get(),
                                 tile.sums.get() + (r * part.panels + p) * panel,
                                 part.panels * panel, true, prefetch);
    }
  }

  Prefetch next_block(const Part& part, int64_t column) const {
    const auto& head = span_.head;
    const int64_t depth = std::min(kDepth, span_.columns - column);
    const int64_t from = part.panel * span_.kernels.panel;
    Prefetch prefetch;
    prefetch.add(head.weight_at(span_.first + column, from),
              head.weight_stride * head.element_size(), depth,
              std::min(part.panels * span_.kernels.panel, head.width - from) *
                  head.element_size());
    prefetch.add(span_.logits + column * span_.stride + part.row, span_.stride * sizeof(T), depth,
              part.rows * sizeof(T));
    prefetch.spread(part.panels * (part.rows / span_.kernels.block_rows));
    return prefetch;
  }

  const ColumnSpan<T>& span_;
  std::vector<Tile> tiles_;
};

}  // namespace s2srm::lm_head
