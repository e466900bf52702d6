// s2srm::gae.cpp on the CPU: backwards through each sequence, sequences in parallel.
//
//     delta_t = r_t + gamma * V_{t+1} - V_t,   A_t = delta_t + gamma * lam * A_{t+1}
//
// The recursion runs in double whatever the dtype: its latency hides the conversions, and a float32
// result is then the rounded exact one but for a last bit. Left out: splitting one sequence over
// threads, which reads it twice; one thread's pass already runs near the speed of memory.

#include <tuple>

#include "sequences.h"

namespace s2srm {
namespace {

template <typename T>
void run_sequence(const T* rewards, const T* values, T* advantages, T* returns, int64_t length,
                  double gamma, double decay, double next_value) {
  double advantage = 0;
  for (int64_t t = length - 1; t >= 0; --t) {
    const double value = values[t];
    advantage = (rewards[t] + gamma * next_value - value) + decay * advantage;
    advantages[t] = static_cast<T>(advantage);
    returns[t] = static_cast<T>(advantage + value);
    next_value = value;
  }
}

template <typename T>
void run(const Tensor& rewards, const Tensor& values, const Segments& segments, double gamma,
         double lam, const std::optional<Tensor>& bootstrap, Tensor& advantages, Tensor& returns) {
  const T* r = rewards.const_data_ptr<T>();
  const T* v = values.const_data_ptr<T>();
  const T* after = bootstrap ? bootstrap->const_data_ptr<T>() : nullptr;
  T* a = advantages.mutable_data_ptr<T>();
  T* g = returns.mutable_data_ptr<T>();
  for_each_sequence(segments, rewards.size(0), [&](int64_t b) {
    const int64_t start = segments.offsets[b], length = segments.offsets[b + 1] - start;
    run_sequence(r + start, v + start, a + start, g + start, length, gamma, gamma * lam,
                 after == nullptr ? 0.0 : static_cast<double>(after[b]));
  });
}

std::tuple<Tensor, Tensor> gae(const Tensor& rewards, const Tensor& values,
                               const Tensor& cu_seqlens, double gamma, double lam,
                               const std::optional<Tensor>& bootstrap) {
  const int64_t num_rows = rewards.numel();
  const Segments segments(cu_seqlens);
  check_vector("rewards", rewards, num_rows);
  check_vector("values", values, num_rows);
  check_floating("rewards", rewards);
  check_floating("values", values);
  bool wide = is_double(rewards) || is_double(values);
  if (bootstrap) {
    check_vector("bootstrap", *bootstrap, segments.count);
    check_floating("bootstrap", *bootstrap);
    wide = wide || is_double(*bootstrap);
  }
  check_cu_seqlens(segments, num_rows);

  const ScalarType type = wide ? ScalarType::Double : ScalarType::Float;
  const Tensor r = as_contiguous(rewards, type), v = as_contiguous(values, type);
  std::optional<Tensor> after;
  if (bootstrap) after = as_contiguous(*bootstrap, type);
  Tensor advantages = new_vector(rewards, num_rows, type);
  Tensor returns = new_vector(rewards, num_rows, type);
  const auto work = wide ? run<double> : run<float>;
  work(r, v, segments, gamma, lam, after, advantages, returns);
  return {advantages, returns};
}

}  // namespace
}  // namespace s2srm

STABLE_TORCH_LIBRARY_IMPL(s2srm, CPU, m) {
  m.impl("gae.cpp", TORCH_BOX(&s2srm::gae));
}
