// Packed sequences: rows of sequence b are cu_seqlens[b] to cu_seqlens[b + 1]; any may be empty.
#pragma once

#include <algorithm>

#include "checks.h"
#include "cu_seqlens.h"

namespace s2srm {

// Keeps the tensor alive that `cu_seqlens` reads.
struct PackedSequences {
  Tensor tensor;
  CuSeqlens cu_seqlens;
  int64_t count;

  explicit PackedSequences(const Tensor& given) : tensor(given) {
    check_integer("cu_seqlens", given);
    if (given.dim() != 1 || given.size(0) == 0)
      fail("cu_seqlens must have shape (B + 1,), got ", given.dim(), " dimensions and ",
           given.numel(), " values");
    tensor = as_contiguous(given, given.scalar_type());
    cu_seqlens = {tensor.const_data_ptr(), tensor.scalar_type() == ScalarType::Long};
    count = tensor.size(0) - 1;
  }
};

// The three faults of cu_seqlens, in the order and the words of s2srm_kernels/cu_seqlens.py.
inline void fail_start(int64_t first) {
  fail("cu_seqlens must start at 0, got cu_seqlens[0] = ", first);
}

inline void fail_descent(int64_t at, int64_t value, int64_t next) {
  fail("cu_seqlens must be ascending, got cu_seqlens[", at, "] = ", value, " > cu_seqlens[",
       at + 1, "] = ", next);
}

inline void fail_end(int64_t num_rows, int64_t last) {
  fail("cu_seqlens must end at the number of rows ", num_rows, ", got cu_seqlens[-1] = ", last);
}

// --- on the CPU ---

inline void check_cu_seqlens(const PackedSequences& packed, const Tensor& rows) {
  check_same_device("cu_seqlens", packed.tensor, rows);
  const CuSeqlens cu = packed.cu_seqlens;
  if (cu[0] != 0) fail_start(cu[0]);
  for (int64_t b = 0; b < packed.count; ++b)
    if (cu[b] > cu[b + 1]) fail_descent(b, cu[b], cu[b + 1]);
  if (cu[packed.count] != rows.numel()) fail_end(rows.numel(), cu[packed.count]);
}

// The first b in [0, count] with cu_seqlens[b] >= row, else count + 1.
inline int64_t first_start_from(const PackedSequences& packed, int64_t row) {
  int64_t low = 0, high = packed.count + 1;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (packed.cu_seqlens[middle] < row)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// body(b) once for every sequence, shared out over torch's threads in groups of about equally many
// rows. A sequence is one thread's work from end to end, so its result depends neither on the
// number of threads nor on its neighbours.
template <typename Body>
void for_each_sequence(const PackedSequences& packed, int64_t num_rows, const Body& body) {
  constexpr int64_t rows_per_group = 16384;
  const int64_t num_groups = num_rows / rows_per_group + 1;
  torch::stable::parallel_for(0, num_groups, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = first_start_from(packed, begin * rows_per_group);
    const int64_t last =
        end == num_groups ? packed.count : first_start_from(packed, end * rows_per_group);
    for (int64_t b = first; b < std::min(last, packed.count); ++b) body(b);
  });
}

}  // namespace s2srm
