// Work shared out among torch's threads, and memory for it.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>

namespace s2srm::lm_head {

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

}  // namespace s2srm::lm_head
