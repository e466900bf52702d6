// Packed sequences: rows of sequence b are cu_seqlens[b] to cu_seqlens[b + 1]; any may be empty.
#pragma once

#include "checks.h"
#include "offsets.h"

namespace s2srm {

// Where the sequences of `cu_seqlens` begin and end; keeps the tensor alive.
struct Segments {
  Tensor tensor;
  Offsets offsets;
  int64_t count;

  explicit Segments(const Tensor& cu_seqlens) : tensor(cu_seqlens) {
    check_integer("cu_seqlens", cu_seqlens);
    if (cu_seqlens.dim() != 1 || cu_seqlens.size(0) == 0)
      fail("cu_seqlens must have shape (B + 1,), got ", cu_seqlens.dim(), " dimensions and ",
           cu_seqlens.numel(), " values");
    tensor = as_contiguous(cu_seqlens, cu_seqlens.scalar_type());
    offsets = {tensor.const_data_ptr(), tensor.scalar_type() == ScalarType::Long};
    count = tensor.size(0) - 1;
  }
};

// The three faults of cu_seqlens, in the order and the words of _segments.py.
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

}  // namespace s2srm
