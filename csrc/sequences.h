// CPU: sequences shared out over torch's threads in groups of about equally many rows.
#pragma once

#include <algorithm>
#include <cstdint>

#include "segments.h"

namespace s2srm {

inline void check_cu_seqlens(const Segments& segments, const Tensor& rows) {
  check_same_device("cu_seqlens", segments.tensor, rows);
  const int64_t num_rows = rows.numel();
  const Offsets cu = segments.offsets;
  const int64_t count = segments.count;
  if (cu[0] != 0) fail_start(cu[0]);
  for (int64_t b = 0; b < count; ++b)
    if (cu[b] > cu[b + 1]) fail_descent(b, cu[b], cu[b + 1]);
  if (cu[count] != num_rows) fail_end(num_rows, cu[count]);
}

// The first b in 0..count + 1 with cu[b] >= row.
inline int64_t first_at_or_after(const Segments& segments, int64_t row) {
  int64_t low = 0, high = segments.count + 1;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (segments.offsets[middle] < row)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// body(b) once for every sequence. A sequence is one thread's work from end to end, so its result
// depends neither on the number of threads nor on its neighbours.
template <typename Body>
void for_each_sequence(const Segments& segments, int64_t num_rows, const Body& body) {
  constexpr int64_t rows_per_group = 16384;
  const int64_t num_groups = num_rows / rows_per_group + 1;
  torch::stable::parallel_for(0, num_groups, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = first_at_or_after(segments, begin * rows_per_group);
    const int64_t last =
        end == num_groups ? segments.count : first_at_or_after(segments, end * rows_per_group);
    for (int64_t b = first; b < std::min(last, segments.count); ++b) body(b);
  });
}

}  // namespace s2srm
