// Gradients from the rows' statistics. Columns are taken a span at a time, and a span goes through
// three phases, each shared out among the threads:
//
//     logits    made again, or read back, and turned into their gradients dz in place
//     hidden    d_hidden += dz^T W, the columns in order
//     weight    d_weight = dz X of the span's columns: the rows in order, written once
//
// Every sum has one fixed order, so the results do not depend on the number of threads. Where the
// logits lie in the memory of d_weight the last phase overwrites them, tile by tile.

#include <cmath>
#include <limits>
#include <vector>

#include "vocabulary.h"

namespace s2srm::cpu {
namespace {

constexpr int64_t kTaskPanels = 6;  // of the width, whose sums are made together
constexpr int64_t kPackedBlock = packed_size(kBlockRows, kDepth);

// What one worker needs in the second and third phase.
template <class T>
struct ProductTile {
  Buffer<T> left{kTaskRows / kBlockRows * kPackedBlock}, right{kDepth * kMaxPanel};
  Buffer<T> sums{std::max(kTaskRows * kTaskPanels, kTileColumns) * kMaxPanel}, copy;
  explicit ProductTile(int64_t copied) : copy(copied) {}
};

template <class T>
class Span {
 public:
  Span(const Head<T>& head, const TileKernels<T>& kernels, const Coefficients<T>& coefficients,
       int64_t stride, const Outputs<T>& outputs, bool in_place)
      : head_(head),
        kernels_(kernels),
        coefficients_(coefficients),
        stride_(stride),
        outputs_(outputs),
        in_place_(in_place),
        padded_(ceil_div(head.num_rows, kMaxPanel) * kMaxPanel),
        rows_(5 * padded_),
        others_(head.num_rows),
        tiles_(num_workers()) {
    const int64_t copied = in_place_ ? kTileColumns * head.num_rows : 0;
    for (int64_t i = 0; i < num_workers(); ++i) product_tiles_.emplace_back(copied);
    fill_coefficients();
  }

  void select(int64_t first_column, int64_t columns, T* logits) {
    first_ = first_column;
    columns_ = columns;
    logits_ = logits;
  }

  // dz of num_rows rows: from the logits that are there, or, given `hidden`, from new ones.
  void logits_phase(const PackedHidden<T>* hidden, int64_t first_row, int64_t num_rows) {
    const int64_t tiles = num_tiles();
    for_each_task(ceil_div(num_rows, kTaskRows) * tiles, [&](int64_t worker, int64_t task) {
      const int64_t block = task / tiles * kTaskRows;
      logits_task(hidden, block, first_row + block, std::min(kTaskRows, num_rows - block),
                  task % tiles, tiles_[worker]);
    });
  }

  void hidden_phase() {
    const int64_t panels = ceil_div(head_.width, kernels_.panel);
    const int64_t parts = ceil_div(panels, kTaskPanels), length = ceil_div(panels, parts);
    int64_t rows = kTaskRows;  // of a task: as many as keep every worker busy
    while (rows > kMaxPanel && ceil_div(head_.num_rows, rows) * parts < 4 * num_workers())
      rows /= 2;
    for_each_task(ceil_div(head_.num_rows, rows) * parts, [&](int64_t worker, int64_t task) {
      const int64_t first = task % parts * length;
      hidden_task(task / parts * rows, rows, first, std::min(length, panels - first),
                  product_tiles_[worker]);
    });
  }

  void weight_phase() {
    // In place, all of a tile's columns are copied before any is overwritten: one task.
    const int64_t panels = ceil_div(head_.width, kernels_.panel);
    const int64_t parts = in_place_ || outputs_.weight == nullptr ? 1 : panels;
    for_each_task(num_tiles() * parts, [&](int64_t worker, int64_t task) {
      const int64_t tile = task / parts, part = task % parts;
      const T* dz = tile_logits(tile);
      int64_t stride = stride_;
      if (part == 0 && outputs_.bias != nullptr) bias_task(tile);
      if (outputs_.weight == nullptr) return;
      if (in_place_) {
        T* copy = product_tiles_[worker].copy.get();
        for (int64_t c = 0; c < tile_columns(tile); ++c)
          std::copy_n(dz + c * stride, head_.num_rows, copy + c * head_.num_rows);
        dz = copy;
        stride = head_.num_rows;
      }
      for (int64_t p = part; p < (parts == 1 ? panels : part + 1); ++p)
        weight_task(tile, p, dz, stride, product_tiles_[worker]);
    });
  }

 private:
  int64_t num_tiles() const { return ceil_div(columns_, kTileColumns); }
  int64_t tile_columns(int64_t tile) const {
    return std::min(kTileColumns, columns_ - tile * kTileColumns);
  }
  T* tile_logits(int64_t tile) const { return logits_ + tile * kTileColumns * stride_; }
  bool live(int64_t row, int64_t tile) const {
    return coefficients_.live == nullptr ||
           coefficients_.live[row / kBlockRows * coefficients_.live_stride +
                              first_ / kTileColumns + tile];
  }

  // Rows behind the last get a maximum of infinity, hence p = 0 whatever the bias is.
  void fill_coefficients() {
    const auto& in = coefficients_;
    T *max = rows_.get(), *log_sum = max + padded_, *constant = log_sum + padded_;
    T *entropy_slope = constant + padded_, *uniform = entropy_slope + padded_;
    std::fill_n(max, 5 * padded_, T(0));
    std::fill(max + head_.num_rows, max + padded_, std::numeric_limits<T>::infinity());
    for (int64_t r = 0; r < head_.num_rows; ++r) {
      max[r] = in.max_logit[r];
      log_sum[r] = in.log_sum[r];
      T other = in.d_lse == nullptr ? 0 : in.d_lse[r];
      if (in.d_mean_logprob != nullptr) {
        other -= in.d_mean_logprob[r];
        uniform[r] = in.d_mean_logprob[r] / static_cast<T>(in.num_total);
      }
      if (in.d_entropy != nullptr) entropy_slope[r] = in.d_entropy[r];
      others_.get()[r] = other;
      constant[r] = other - in.d_logprobs[r];
    }
    if (in.entropy == nullptr) return;
    entropy_ = Buffer<T>(padded_);
    std::fill_n(entropy_.get(), padded_, T(0));
    std::copy_n(in.entropy, head_.num_rows, entropy_.get());
  }

  RowCoefficients<T> panel_coefficients(int64_t row) const {
    const T* base = rows_.get() + row;
    return {base,
            base + padded_,
            base + 2 * padded_,
            coefficients_.d_entropy == nullptr ? nullptr : base + 3 * padded_,
            entropy_.get() + row,
            coefficients_.d_mean_logprob == nullptr ? nullptr : base + 4 * padded_,
            head_.softcap,
            head_.temperature};
  }

  // packed_row: the first row of the task among those that `hidden` holds.
  void logits_task(const PackedHidden<T>* hidden, int64_t packed_row, int64_t first_row,
                   int64_t num_rows, int64_t tile, LogitTile<T>& logits) const {
    const int64_t panel = kernels_.panel, panels = ceil_div(num_rows, panel);
    const int64_t columns = tile_columns(tile);
    const auto wanted = [&](int64_t p) { return live(first_row + p * panel, tile); };
    if (hidden != nullptr)
      logits.compute(head_, kernels_, *hidden, packed_row / panel, panels,
                     first_ + tile * kTileColumns, columns, wanted);
    for (int64_t p = 0; p < panels; ++p) {
      if (!wanted(p)) continue;
      const int64_t row = first_row + p * panel, rows = std::min(panel, num_rows - p * panel);
      T *z = logits.z(kernels_, p), *out = tile_logits(tile) + row;
      if (hidden == nullptr)
        for (int64_t c = 0; c < columns; ++c) std::copy_n(out + c * stride_, rows, z + c * panel);
      panel_gradients(z, row, rows, tile, columns);
      for (int64_t c = 0; c < columns; ++c) std::copy_n(z + c * panel, rows, out + c * stride_);
    }
  }

  void panel_gradients(T* z, int64_t first_row, int64_t rows, int64_t tile,
                       int64_t columns) const {
    const int64_t first_column = first_ + tile * kTileColumns;
    T at_target[kMaxPanel];
    const auto entry = [&](int64_t r) -> T* {
      const int64_t c = head_.target[first_row + r] - first_column;
      return c < 0 || c >= columns ? nullptr : z + c * kernels_.panel + r;
    };
    for (int64_t r = 0; r < rows; ++r)
      if (const T* place = entry(r)) at_target[r] = target_gradient(*place, first_row + r);
    kernels_.gradients(columns, ceil_div(rows, kernels_.lanes), panel_coefficients(first_row), z);
    for (int64_t r = 0; r < rows; ++r)
      if (T* place = entry(r)) *place = at_target[r];
  }

  // 1 - p as -expm1(log p): a confident target, whose p is nearly 1, keeps its digits.
  T target_gradient(T z, int64_t row) const {
    const auto& in = coefficients_;
    const T logp = (z - in.max_logit[row]) - in.log_sum[row];
    T factor = others_.get()[row];
    if (in.d_entropy != nullptr)
      factor -= in.d_entropy[row] * (std::max(logp, T(-1000)) + in.entropy[row]);
    T dz = factor * std::exp(logp) - in.d_logprobs[row] * std::expm1(logp);
    if (in.d_mean_logprob != nullptr)
      dz += in.d_mean_logprob[row] / static_cast<T>(in.num_total);
    if (head_.softcap != 0) {
      const T capped = z * (head_.temperature / head_.softcap);
      dz *= 1 - capped * capped;
    }
    return dz / head_.temperature;
  }

  // d_hidden of up to `count` rows and `panels` panels of the width from first_panel on.
  void hidden_task(int64_t first_row, int64_t count, int64_t first_panel, int64_t panels,
                   ProductTile<T>& tile) const {
    const int64_t panel = kernels_.panel, from = first_panel * panel, stride = panels * panel;
    const int64_t rows = std::min(count, head_.num_rows - first_row);
    const int64_t length = std::min(stride, head_.width - from);
    T* sums = tile.sums.get();
    const auto out = [&](int64_t r) {
      return outputs_.hidden + head_.rows[first_row + r] * head_.width + from;
    };
    for (int64_t r = 0; r < rows; ++r) {
      std::fill_n(sums + r * stride, stride, T(0));
      if (first_ > 0) std::copy_n(out(r), length, sums + r * stride);
    }
    for (int64_t c = 0; c < columns_; c += kDepth)
      hidden_block(c, first_row, rows, from, panels, sums, tile);
    for (int64_t r = 0; r < rows; ++r) std::copy_n(sums + r * stride, length, out(r));
  }

  void hidden_block(int64_t column, int64_t first_row, int64_t rows, int64_t from, int64_t panels,
                    T* sums, ProductTile<T>& tile) const {
    const int64_t panel = kernels_.panel, depth = std::min(kDepth, columns_ - column);
    const auto wanted = [&](int64_t r) { return live(first_row + r, column / kTileColumns); };
    const auto left = [&](int64_t r) { return tile.left.get() + r / kBlockRows * kPackedBlock; };
    bool some = false;
    for (int64_t r = 0; r < rows; r += kBlockRows) {
      if (!wanted(r)) continue;
      kernels_.pack_transposed(std::min(kBlockRows, rows - r), depth,
                               logits_ + column * stride_ + first_row + r, stride_, left(r));
      some = true;
    }
    for (int64_t p = 0; some && p < panels; ++p) {
      const int64_t start = from + p * panel, length = std::min(panel, head_.width - start);
      pack(head_.weight, (first_ + column) * head_.weight_stride + start, head_.weight_stride,
           depth, length, tile.right.get());
      for (int64_t r = 0; r < rows; r += kBlockRows)
        if (wanted(r))
          kernels_.product_packed(std::min(kBlockRows, rows - r), depth,
                                  ceil_div(length, kernels_.lanes), left(r), tile.right.get(),
                                  sums + (r * panels + p) * panel, panels * panel, true);
    }
  }

  // d_weight of one tile and one panel of the width.
  void weight_task(int64_t tile, int64_t part, const T* dz, int64_t stride,
                   ProductTile<T>& scratch) const {
    const int64_t panel = kernels_.panel, from = part * panel, columns = tile_columns(tile);
    const int64_t length = std::min(panel, head_.width - from);
    T *sums = scratch.sums.get(), *right = scratch.right.get();
    bool some = false;
    for (int64_t r = 0; r < head_.num_rows; r += kBlockRows) {
      if (!live(r, tile)) continue;
      const int64_t depth = std::min(kBlockRows, head_.num_rows - r);
      pack_rows(r, from, depth, length, right);
      kernels_.product(columns, depth, ceil_div(length, kernels_.lanes), dz + r, stride, right,
                       sums, panel, some);
      some = true;
    }
    if (!some) std::fill_n(sums, kTileColumns * panel, T(0));
    const int64_t first = first_ + tile * kTileColumns;
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t place = (first + c) * head_.width + from;
      if (outputs_.accumulate) {
        const T* before = static_cast<const T*>(outputs_.weight) + place;
        for (int64_t i = 0; i < length; ++i) sums[c * panel + i] += before[i];
      }
      write(outputs_.weight_element, sums + c * panel, length, outputs_.weight, place);
    }
  }

  void bias_task(int64_t tile) const {
    constexpr int64_t lanes = 16;
    for (int64_t c = 0; c < tile_columns(tile); ++c) {
      const T* dz = tile_logits(tile) + c * stride_;
      T sums[lanes] = {}, total = 0;
      for (int64_t r = 0; r < head_.num_rows; r += lanes) {
        if (!live(r, tile)) continue;  // kBlockRows is a multiple of lanes
        for (int64_t i = 0; i < std::min(lanes, head_.num_rows - r); ++i) sums[i] += dz[r + i];
      }
      for (T sum : sums) total += sum;
      T* out = outputs_.bias + first_ + tile * kTileColumns + c;
      *out = outputs_.accumulate ? *out + total : total;
    }
  }

  // `depth` rows of `length` elements of the weight -> a panel, zeros behind them.
  void pack(const void* base, int64_t offset, int64_t stride, int64_t depth, int64_t length,
            T* out) const {
    for (int64_t k = 0; k < depth; ++k, out += kernels_.panel) {
      read(head_.element, base, offset + k * stride, length, out);
      std::fill(out + length, out + kernels_.panel, T(0));
    }
  }
  void pack_rows(int64_t first_row, int64_t from, int64_t depth, int64_t length, T* out) const {
    for (int64_t k = 0; k < depth; ++k)
      pack(head_.hidden, head_.rows[first_row + k] * head_.hidden_stride + from, 0, 1, length,
           out + k * kernels_.panel);
  }

  const Head<T>& head_;
  const TileKernels<T>& kernels_;
  const Coefficients<T>& coefficients_;
  const int64_t stride_;
  const Outputs<T>& outputs_;
  const bool in_place_;
  const int64_t padded_;
  Buffer<T> rows_, others_, entropy_{0};
  std::vector<LogitTile<T>> tiles_;
  std::vector<ProductTile<T>> product_tiles_;
  T* logits_ = nullptr;
  int64_t first_ = 0, columns_ = 0;
};

}  // namespace

template <class T>
void gradients(const Head<T>& head, const TileKernels<T>& kernels,
               const Coefficients<T>& coefficients, T* logits, int64_t logits_stride, int64_t span,
               bool stored, const Outputs<T>& outputs) {
  const int64_t group = stored ? head.num_rows : PackedHidden<T>::capacity(head);
  PackedHidden<T> hidden(head, kernels, stored ? 0 : group);
  Span<T> work(head, kernels, coefficients, logits_stride, outputs, logits == outputs.weight);
  for (int64_t column = 0; column < head.num_columns; column += span) {
    work.select(column, std::min(span, head.num_columns - column),
                stored ? logits + column * logits_stride : logits);
    for (int64_t first = 0; first < head.num_rows; first += group) {
      const int64_t rows = std::min(group, head.num_rows - first);
      if (!stored && (column == 0 || group < head.num_rows)) hidden.pack(first, rows);
      work.logits_phase(stored ? nullptr : &hidden, first, rows);
    }
    if (outputs.hidden != nullptr) work.hidden_phase();
    if (outputs.weight != nullptr || outputs.bias != nullptr) work.weight_phase();
  }
}

template void gradients(const Head<float>&, const TileKernels<float>&, const Coefficients<float>&,
                        float*, int64_t, int64_t, bool, const Outputs<float>&);
template void gradients(const Head<double>&, const TileKernels<double>&,
                        const Coefficients<double>&, double*, int64_t, int64_t, bool,
                        const Outputs<double>&);

}  // namespace s2srm::cpu
