// Memory to bring near while products compute: what comes next is a strided block of a large
// matrix, which the processor's own prefetching does not foresee.
#pragma once

#include <cstdint>

namespace s2srm::lm_head {

class Prefetch {
 public:
  // `rows` times `bytes`, `stride` bytes apart.
  void add(const void* row, int64_t stride, int64_t rows, int64_t bytes) {
    if (rows <= 0 || bytes <= 0) return;
    parts_[count_++] = {static_cast<const char*>(row), stride, rows, bytes};
    total_ += rows * ((bytes + kStep - 1) / kStep);
  }

  // Share everything out among so many calls of advance().
  void spread(int64_t calls) { steps_ = calls > 0 ? (total_ + calls - 1) / calls : total_; }

  // Inlined into code for every instruction set, so that no copy for one of them is shared.
  __attribute__((always_inline)) void advance() {
    for (int64_t s = 0; s < steps_ && current_ < count_; ++s) {
      Part& part = parts_[current_];
      for (int64_t b = 0; b < kStep; b += 64) __builtin_prefetch(part.row + offset_ + b, 0, 2);
      offset_ += kStep;
      if (offset_ < part.bytes) continue;
      offset_ = 0;
      part.row += part.stride;
      if (--part.rows == 0) ++current_;
    }
  }

 private:
  static constexpr int64_t kStep = 256;
  struct Part {
    const char* row;
    int64_t stride, rows, bytes;
  };
  Part parts_[3];
  int count_ = 0, current_ = 0;
  int64_t total_ = 0, steps_ = 0, offset_ = 0;
};

}  // namespace s2srm::lm_head
