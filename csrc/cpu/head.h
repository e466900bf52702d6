// The LM head of one call as the CPU's drivers see it, and the pieces that they share: reading
// elements of any dtype as the compute type T (float or double), hidden packed into panels, the
// products of one tile, tasks shared out among torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "tiles.h"

namespace s2srm::cpu {

enum class Element { kCompute, kHalf, kBFloat16 };  // kCompute: T itself

// hidden[rows[i]] for i < num_rows are the live rows; a row of hidden or weight is contiguous.
template <class T>
struct Head {
  Element element;
  const void* hidden;
  int64_t hidden_stride;
  const int64_t* rows;
  int64_t num_rows;
  const void* weight;
  int64_t weight_stride;
  int64_t num_columns;
  int64_t width;         // D
  const void* bias;      // (num_columns) or null
  const int64_t* target; // (num_rows) columns, -1 where there is none here
  T softcap;             // 0: none
  T temperature;

  int64_t element_size() const { return element == Element::kCompute ? sizeof(T) : 2; }
  const char* weight_at(int64_t column, int64_t k) const {
    return static_cast<const char*>(weight) + (column * weight_stride + k) * element_size();
  }
  const char* hidden_at(int64_t row, int64_t k) const {
    return static_cast<const char*>(hidden) + (row * hidden_stride + k) * element_size();
  }
  bool plain() const { return bias == nullptr && softcap == 0 && temperature == 1; }
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(static_cast<T*>(
            ::operator new(std::max<int64_t>(size, 1) * sizeof(T), std::align_val_t{64}))) {}
  T* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  std::unique_ptr<T, Free> data_;
};

template <class T, class Source>
void convert(const Source* in, int64_t count, T* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(static_cast<float>(in[i]));
}

template <class T>
void read(Element element, const void* base, int64_t offset, int64_t count, T* out) {
  using torch::headeronly::BFloat16;
  using torch::headeronly::Half;
  if (element == Element::kHalf)
    convert(static_cast<const Half*>(base) + offset, count, out);
  else if (element == Element::kBFloat16)
    convert(static_cast<const BFloat16*>(base) + offset, count, out);
  else
    std::copy_n(static_cast<const T*>(base) + offset, count, out);
}

// Rounded to the nearest.
template <class T>
void write(Element element, const T* in, int64_t count, void* base, int64_t offset) {
  using torch::headeronly::BFloat16;
  using torch::headeronly::Half;
  if (element == Element::kHalf)
    for (int64_t i = 0; i < count; ++i)
      static_cast<Half*>(base)[offset + i] = static_cast<float>(in[i]);
  else if (element == Element::kBFloat16)
    for (int64_t i = 0; i < count; ++i)
      static_cast<BFloat16*>(base)[offset + i] = static_cast<float>(in[i]);
  else
    std::copy_n(in, count, static_cast<T*>(base) + offset);
}

inline int64_t num_workers() { return torch::stable::get_num_threads(); }

// run(worker, task) for every task; a worker that is done takes the next one, so that which worker
// runs a task is chance. Nothing may depend on it.
template <class Run>
void for_each_task(int64_t num_tasks, const Run& run) {
  const int64_t workers = std::min(num_workers(), num_tasks);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t worker, int64_t) {
    for (int64_t task = next++; task < num_tasks; task = next++) run(worker, task);
  });
}

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

// What one worker needs for the logits of kTaskRows rows by one tile.
inline constexpr int64_t kTaskRows = 2 * kBlockRows;

template <class T>
class LogitTile {
 public:
  LogitTile()
      : z_(kTaskRows * kTileColumns), weight_(kDepth * kTileColumns), bias_(kTileColumns) {}

  // z of a panel of the task.
  T* z(const TileKernels<T>& kernels, int64_t panel) const {
    return z_.get() + panel * kTileColumns * kernels.panel;
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

  // Logits of `panels` panels from `first_panel` on and `columns` columns from `first_column` on;
  // panels that `wanted(panel of the task)` refuses are left as they are.
  template <class Wanted>
  void compute(const Head<T>& head, const TileKernels<T>& kernels, const PackedHidden<T>& hidden,
               int64_t first_panel, int64_t panels, int64_t first_column, int64_t columns,
               const Wanted& wanted) {
    int64_t k = 0;
    do {  // once for a width of 0
      const int64_t depth = std::min(kDepth, head.width - k);
      int64_t stride = head.weight_stride;
      const T* weight = block(head, first_column, columns, k, depth, stride);
      Ahead ahead = next_block(head, first_column, columns, k + kDepth);
      ahead.spread(panels * (columns / kernels.block_rows));
      for (int64_t p = 0; p < panels; ++p)
        if (wanted(p))
          kernels.product(columns, depth, hidden.vectors(first_panel + p), weight, stride,
                          hidden.at(first_panel + p, k), z(kernels, p), kernels.panel, k > 0,
                          ahead);
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
  static Ahead next_block(const Head<T>& head, int64_t first_column, int64_t columns, int64_t k) {
    if (k >= head.width) {
      k = 0;
      first_column += columns;
    }
    Ahead ahead;
    ahead.add(head.weight_at(first_column, k), head.weight_stride * head.element_size(),
              std::min(columns, head.num_columns - first_column),
              std::min(kDepth, head.width - k) * head.element_size());
    return ahead;
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

}  // namespace s2srm::cpu
