// The LM head of one call: its live rows, its columns and what makes logits of their products.
#pragma once

#include <cstdint>

#include "elements.h"
#include "simd/kernels.h"

namespace s2srm::lm_head {

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
  // Of a sum of `length` products, how many are summed in registers before they are added in
  // memory. The square root rounds least, and costs a little time: a small head has it to spare.
  int64_t run(int64_t length) const {
    if (num_columns * width > 1 << 22) return kDepth;
    int64_t run = 16;
    while (run < kDepth && run * run < length) run *= 2;
    return run;
  }
  bool plain() const { return bias == nullptr && softcap == 0 && temperature == 1; }
};

}  // namespace s2srm::lm_head
