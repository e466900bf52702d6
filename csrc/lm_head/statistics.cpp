// Statistics of every row in one pass over the vocabulary: the logits of a tile are turned into
// statistics while they lie in a near cache, and are never seen again unless they are to be kept.
//
// The vocabulary is cut into at most kMostSplits splits, whatever the number of threads; tiles are
// merged in order within a split, and splits in order at the end.

#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "logit_tile.h"
#include "passes.h"

namespace s2srm::lm_head {
namespace {

constexpr int64_t kMostSplits = 64;

struct Splits {
  int64_t num_tiles, length, count;  // length in tiles
  explicit Splits(int64_t num_columns)
      : num_tiles(ceil_div(num_columns, kTileColumns)),
        length(ceil_div(num_tiles, kMostSplits)),
        count(ceil_div(num_tiles, length)) {}
  int64_t columns(int64_t split, int64_t num_columns) const {
    const int64_t first = split * length * kTileColumns;
    return std::min(length * kTileColumns, num_columns - first);
  }
};

template <class T>
struct Results {
  const T* target_logits;
  int wanted;
  T* packed;
  T* tile_lse;
  T* logits;
  int64_t logits_stride;
  const Draws<T>* draws;
};

// One group of rows, those that `hidden` holds, from first_row on.
template <class T>
class RowGroup {
 public:
  RowGroup(const Head<T>& head, const TileKernels<T>& kernels, const PackedHidden<T>& hidden,
        int64_t first_row, const Results<T>& results)
      : head_(head),
        kernels_(kernels),
        hidden_(hidden),
        first_row_(first_row),
        results_(results),
        splits_(head.num_columns),
        stride_(hidden.num_panels() * kernels.panel),
        states_(splits_.count * kNumStatistics * stride_),
        target_(stride_) {
    for (int64_t r = 0; r < hidden.num_rows(); ++r) {
      if (results.target_logits != nullptr) target_.get()[r] = results.target_logits[first_row + r];
      packed(r)[4] = -std::numeric_limits<T>::infinity();
    }
    std::fill(target_.get() + hidden.num_rows(), target_.get() + stride_, T(0));
    if (results.draws != nullptr)
      draws_.emplace(*results.draws, first_row, splits_.count, stride_);
  }

  int64_t num_tasks() const { return ceil_div(hidden_.num_rows(), kTaskRows) * splits_.count; }

  void run(int64_t task, LogitTile<T>& tile) const {
    const int64_t split = task % splits_.count;
    const int64_t task_panels = kTaskRows / kernels_.panel;
    const int64_t first_panel = task / splits_.count * task_panels;
    const int64_t panels = std::min(task_panels, hidden_.num_panels() - first_panel);
    const int64_t begin = split * splits_.length;
    const int64_t end = std::min(begin + splits_.length, splits_.num_tiles);
    const auto all = [](int64_t) { return true; };
    for (int64_t t = begin; t < end; ++t) {
      const int64_t column = t * kTileColumns;
      const int64_t columns = std::min(kTileColumns, head_.num_columns - column);
      tile.compute(head_, kernels_, hidden_, first_panel, panels, column, columns,
                   all);
      if (results_.logits != nullptr)
        tile.store(kernels_, std::min(kTaskRows, hidden_.num_rows() - first_panel * kernels_.panel),
                   columns, all,
                   results_.logits + column * results_.logits_stride + first_row_ +
                       first_panel * kernels_.panel,
                   results_.logits_stride);
      tile.scale(head_, kernels_, hidden_, first_panel, panels, columns);
      for (int64_t p = 0; p < panels; ++p)
        finish_panel(tile.z(kernels_, p), first_panel + p, t, columns,
                     (t - begin) * kTileColumns, state(split));
      for (int64_t p = 0; draws_ && p < panels; ++p)
        draws_->add(kernels_, split, (first_panel + p) * kernels_.panel,
                    hidden_.rows(first_panel + p), column, columns, tile.z(kernels_, p));
    }
  }

  // Merges the splits of one panel and writes its rows.
  void finish(int64_t panel) const {
    const int64_t at = panel * kernels_.panel;
    T* total = state(0) + at;
    int64_t merged = splits_.columns(0, head_.num_columns);
    for (int64_t s = 1; s < splits_.count; ++s) {
      const int64_t added = splits_.columns(s, head_.num_columns);
      kernels_.merge(hidden_.vectors(panel), merged, total, added, state(s) + at, stride_);
      merged += added;
    }
    for (int64_t r = 0; r < hidden_.rows(panel); ++r) {
      T* out = packed(at + r);
      for (int64_t s : {kMax, kRest, kExpShift, kShift}) out[s] = total[s * stride_ + r];
      out[5] = total[kArgmax * stride_ + r];
      out[6] = total[kAbove * stride_ + r];
      if (draws_) draws_->finish(at + r);
    }
  }

 private:
  T* state(int64_t split) const { return states_.get() + split * kNumStatistics * stride_; }
  T* packed(int64_t row) const { return results_.packed + (first_row_ + row) * kPackedStatistics; }

  void finish_panel(const T* z, int64_t panel, int64_t tile, int64_t columns, int64_t merged,
                    T* state) const {
    const int64_t at = panel * kernels_.panel, first = first_row_ + at;
    const int64_t rows = hidden_.rows(panel), column = tile * kTileColumns;
    T own[kNumStatistics * kMaxPanel];
    const bool counts = results_.target_logits != nullptr;
    kernels_.statistics(columns, hidden_.vectors(panel), z, results_.wanted,
                        counts ? target_.get() + at : nullptr, column, merged, state + at, stride_,
                        results_.tile_lse == nullptr ? nullptr : own);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t target = head_.target[first + r] - column;
      if (target >= 0 && target < columns) packed(at + r)[4] = z[target * kernels_.panel + r];
      if (results_.tile_lse != nullptr)
        results_.tile_lse[(first + r) * splits_.num_tiles + tile] =
            own[kMax * kernels_.panel + r] + std::log1p(own[kRest * kernels_.panel + r]);
    }
  }

  const Head<T>& head_;
  const TileKernels<T>& kernels_;
  const PackedHidden<T>& hidden_;
  const int64_t first_row_;
  const Results<T>& results_;
  const Splits splits_;
  const int64_t stride_;
  Buffer<T> states_, target_;
  std::optional<DrawGroup<T>> draws_;
};

// One row's sum over the width, in the blocks and the order of LogitTile::compute.
template <class T>
void target_products(const Head<T>& head, const TileKernels<T>& kernels, int64_t row, T* hidden,
                     T* weight, T* z) {
  int64_t k = 0;
  Prefetch none;
  const int64_t from = head.rows[row] * head.hidden_stride;
  std::fill_n(hidden, kDepth * kernels.panel, T(0));  // of the panel only row 0 is set
  do {
    const int64_t depth = std::min(kDepth, head.width - k);
    read(head.element, head.hidden, from + k, depth, weight);
    for (int64_t i = 0; i < depth; ++i) hidden[i * kernels.panel] = weight[i];
    read(head.element, head.weight, head.target[row] * head.weight_stride + k, depth, weight);
    kernels.product(1, depth, head.run(head.width), 1, weight, depth, hidden, z, kernels.panel,
                    k > 0, none);
    k += kDepth;
  } while (k < head.width);
}

}  // namespace

template <class T>
void target_logits(const Head<T>& head, const TileKernels<T>& kernels, T* out) {
  for_each_task(head.num_rows, [&](int64_t, int64_t row) {
    if (head.target[row] < 0) {
      out[row] = -std::numeric_limits<T>::infinity();
      return;
    }
    T hidden[kDepth * kMaxPanel], weight[kDepth], z[kMaxPanel], bias = 0;
    target_products(head, kernels, row, hidden, weight, z);
    if (head.bias != nullptr) read(head.element, head.bias, head.target[row], 1, &bias);
    kernels.finish_logits(1, 1, head.bias == nullptr ? nullptr : &bias, head.softcap,
                          head.temperature, z);
    if (head.softcap != 0) kernels.scale_shares(1, 1, head.softcap, head.temperature, z);
    out[row] = z[0];
  });
}

template <class T>
void statistics(const Head<T>& head, const TileKernels<T>& kernels, const T* target_logits,
                int wanted, T* packed, T* tile_lse, T* logits, int64_t logits_stride,
                const Draws<T>* draws) {
  const int all = target_logits == nullptr ? wanted & ~kWantedCounts : wanted | kWantedCounts;
  const Results<T> results = {target_logits, all, packed, tile_lse, logits, logits_stride, draws};
  const int64_t capacity = PackedHidden<T>::capacity(head);
  PackedHidden<T> hidden(head, kernels, capacity);
  std::vector<LogitTile<T>> tiles(num_workers());
  for (int64_t first = 0; first < head.num_rows; first += capacity) {
    hidden.pack(first, std::min(capacity, head.num_rows - first));
    const RowGroup<T> group(head, kernels, hidden, first, results);
    for_each_task(group.num_tasks(),
                  [&](int64_t worker, int64_t task) { group.run(task, tiles[worker]); });
    for_each_task(hidden.num_panels(), [&](int64_t, int64_t panel) { group.finish(panel); });
  }
}

template void target_logits(const Head<float>&, const TileKernels<float>&, float*);
template void target_logits(const Head<double>&, const TileKernels<double>&, double*);
template void statistics(const Head<float>&, const TileKernels<float>&, const float*, int, float*,
                         float*, float*, int64_t, const Draws<float>*);
template void statistics(const Head<double>&, const TileKernels<double>&, const double*, int,
                         double*, double*, double*, int64_t, const Draws<double>*);

}  // namespace s2srm::lm_head
