// The first phase of a span's gradients: its logits, made again or kept, become their gradients dz.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "column_span.h"
#include "logit_tile.h"

namespace s2srm::lm_head {

template <class T>
class LogitGradients {
 public:
  explicit LogitGradients(const ColumnSpan<T>& span)
      : span_(span),
        num_rows_(span.head.num_rows),
        padded_(ceil_div(num_rows_, kMaxPanel) * kMaxPanel),
        rows_(kNumArrays * padded_),
        at_target_(num_workers() * num_rows_),
        tiles_(num_workers()) {
    fill();
  }

  // dz of the rows that `hidden` holds, from first_row on, from new logits.
  void make(const PackedHidden<T>& hidden, int64_t first_row) {
    const int64_t tiles = span_.num_tiles();
    for_each_task(ceil_div(hidden.num_rows(), kTaskRows) * tiles,
                  [&](int64_t worker, int64_t task) {
                    const int64_t row = task / tiles * kTaskRows;
                    make_tile(hidden, row, first_row + row,
                              std::min(kTaskRows, hidden.num_rows() - row), task % tiles,
                              tiles_[worker]);
                  });
  }

  // dz of all rows in the place of their logits.
  void replace() {
    for_each_task(span_.num_tiles(), [&](int64_t worker, int64_t tile) {
      run(span_.tile_logits(tile), span_.stride, 0, num_rows_, tile,
          at_target_.get() + worker * num_rows_);
    });
  }

 private:
  static constexpr int64_t kNumArrays = 6;  // of RowCoefficients

  // Factors in double, rounded once. Rows behind the last get a maximum of infinity, hence e^-inf.
  void fill() {
    const auto& in = span_.coefficients;
    T *max = rows_.get(), *linear = max + padded_, *uniform = linear + padded_;
    T *entropic = uniform + padded_, *log_sum = entropic + padded_, *entropy = log_sum + padded_;
    std::fill_n(max, kNumArrays * padded_, T(0));
    std::fill(max + num_rows_, max + padded_, std::numeric_limits<T>::infinity());
    for (int64_t r = 0; r < num_rows_; ++r) {
      const RowFactors row = row_factors(r);
      const double inverse_sum = std::exp(-row.log_sum) / span_.head.temperature;
      max[r] = in.max_logit[r];
      linear[r] = static_cast<T>((row.other - in.d_logprobs[r]) * inverse_sum);
      uniform[r] = static_cast<T>(row.uniform / span_.head.temperature);
      if (in.d_entropy == nullptr) continue;
      entropic[r] = static_cast<T>(in.d_entropy[r] * inverse_sum);
      log_sum[r] = in.log_sum[r];
      entropy[r] = in.entropy[r];
    }
  }

  // A row's upstream gradients, gathered: dz = p * (other - d_logprobs - ...) + uniform.
  struct RowFactors {
    double log_sum, other, uniform;
  };
  RowFactors row_factors(int64_t row) const {
    const auto& in = span_.coefficients;
    const double mean = in.d_mean_logprob == nullptr ? 0 : in.d_mean_logprob[row];
    const double lse = in.d_lse == nullptr ? 0 : in.d_lse[row];
    return {static_cast<double>(in.log_sum[row]) + in.log_sum_low[row], lse - mean,
            mean / static_cast<double>(in.num_total)};
  }

  RowCoefficients<T> row_coefficients(int64_t row) const {
    const T* base = rows_.get() + row;
    const auto array = [&](int64_t i) { return base + i * padded_; };
    const bool entropic = span_.coefficients.d_entropy != nullptr;
    return {base,
            array(1),
            array(2),
            entropic ? array(3) : nullptr,
            entropic ? array(4) : nullptr,
            entropic ? array(5) : nullptr,
            span_.head.softcap,
            span_.head.temperature};
  }

  // packed_row: the first row of the task among those that `hidden` holds.
  void make_tile(const PackedHidden<T>& hidden, int64_t packed_row, int64_t first_row,
                 int64_t num_rows, int64_t tile, LogitTile<T>& logits) const {
    const auto& kernels = span_.kernels;
    const int64_t panel = kernels.panel, columns = span_.tile_columns(tile);
    const auto wanted = [&](int64_t p) { return span_.kept(first_row + p * panel, tile); };
    logits.compute(span_.head, kernels, hidden, packed_row / panel, ceil_div(num_rows, panel),
                   span_.first + tile * kTileColumns, columns, wanted);
    T at_target[kMaxPanel];
    for (int64_t r = 0; r < num_rows; r += panel)
      if (wanted(r / panel))
        run(logits.z(kernels, r / panel), panel, first_row + r, std::min(panel, num_rows - r), tile,
            at_target);
    logits.store(kernels, num_rows, columns, wanted, span_.tile_logits(tile) + first_row,
                 span_.stride);
  }

  // z[column * stride + row] -> dz for `rows` rows and a tile; at_target: room for `rows` values.
  void run(T* z, int64_t stride, int64_t first_row, int64_t rows, int64_t tile,
           T* at_target) const {
    const int64_t first_column = span_.first + tile * kTileColumns;
    const int64_t columns = span_.tile_columns(tile);
    const auto entry = [&](int64_t r) -> T* {
      const int64_t c = span_.head.target[first_row + r] - first_column;
      return c < 0 || c >= columns ? nullptr : z + c * stride + r;
    };
    for (int64_t r = 0; r < rows; ++r)
      if (const T* place = entry(r)) at_target[r] = target_gradient(*place, first_row + r);
    span_.kernels.gradients(columns, ceil_div(rows, span_.kernels.lanes),
                            row_coefficients(first_row), z, stride);
    for (int64_t r = 0; r < rows; ++r)
      if (T* place = entry(r)) *place = at_target[r];
    set_entries(z, stride, first_row, rows, first_column, columns);
  }

  void set_entries(T* z, int64_t stride, int64_t first_row, int64_t rows, int64_t first_column,
                   int64_t columns) const {
    const auto& in = span_.coefficients;
    for (int64_t i = 0; i < rows * in.num_entries; ++i) {
      const int64_t at = first_row * in.num_entries + i;
      const int64_t c = in.entry_columns[at] - first_column;
      if (c >= 0 && c < columns) z[c * stride + i / in.num_entries] = in.entry_values[at];
    }
  }

  // 1 - p as -expm1(log p): a confident target, whose p is nearly 1, keeps its digits.
  // kept: the target's logit, with softcap its share of the cap.
  T target_gradient(T kept, int64_t row) const {
    const auto& in = span_.coefficients;
    const auto [log_sum, other, uniform] = row_factors(row);
    const T softcap = span_.head.softcap, temperature = span_.head.temperature;
    const T z = softcap == 0 ? kept : kept * softcap / temperature;  // rounded as in the kernels
    const double logp = (static_cast<double>(z) - in.max_logit[row]) - log_sum;
    double factor = other;
    if (in.d_entropy != nullptr)
      factor -= in.d_entropy[row] * (std::max(logp, -1000.0) + in.entropy[row]);
    double dz = factor * std::exp(logp) - in.d_logprobs[row] * std::expm1(logp) + uniform;
    if (softcap != 0) dz *= 1 - static_cast<double>(kept) * kept;
    return static_cast<T>(dz / temperature);
  }

  const ColumnSpan<T>& span_;
  const int64_t num_rows_, padded_;
  Buffer<T> rows_, at_target_;
  std::vector<LogitTile<T>> tiles_;
};

}  // namespace s2srm::lm_head
