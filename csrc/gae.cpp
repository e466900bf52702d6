// s2srm::gae.cpp on the CPU: backwards through each sequence, sequences in parallel.
//
//     delta_t = r_t + gamma * V_{t+1} - V_t,   A_t = delta_t + gamma * lam * A_{t+1}
//
// In double whatever the dtype: a float32 result is then the rounded exact one but for a last bit.
// Left out: blocks of rows, which shorten the chain of products and sums by a quarter at best, and
// splitting one sequence over threads, which reads it twice.

#include <tuple>

#include "gae_inputs.h"
#include "packed_sequences.h"

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
void run(const GaeInputs& in, const PackedSequences& packed, double gamma, double lam,
         Tensor& advantages, Tensor& returns) {
  const T* r = in.rewards.const_data_ptr<T>();
  const T* v = in.values.const_data_ptr<T>();
  const T* after = in.bootstrap ? in.bootstrap->const_data_ptr<T>() : nullptr;
  T* a = advantages.mutable_data_ptr<T>();
  T* g = returns.mutable_data_ptr<T>();
  for_each_sequence(packed, in.rewards.numel(), [&](int64_t b) {
    const int64_t start = packed.cu_seqlens[b], length = packed.cu_seqlens[b + 1] - start;
    run_sequence(r + start, v + start, a + start, g + start, length, gamma, gamma * lam,
                 after == nullptr ? 0.0 : static_cast<double>(after[b]));
  });
}

std::tuple<Tensor, Tensor> gae(const Tensor& rewards, const Tensor& values,
                               const Tensor& cu_seqlens, const Tensor& options,
                               const std::optional<Tensor>& bootstrap) {
  const auto [gamma, lam] = read_options<2>(options);
  const PackedSequences packed(cu_seqlens);
  const GaeInputs in(rewards, values, bootstrap, packed.count);
  check_cu_seqlens(packed, in.rewards);
  Tensor advantages = new_vector(rewards, in.rewards.numel(), in.type);
  Tensor returns = new_vector(rewards, in.rewards.numel(), in.type);
  const auto work = in.type == ScalarType::Double ? run<double> : run<float>;
  work(in, packed, gamma, lam, advantages, returns);
  return {advantages, returns};
}

}  // namespace
}  // namespace s2srm

STABLE_TORCH_LIBRARY_IMPL(s2srm, CPU, m) {
  m.impl("gae.cpp", TORCH_BOX(&s2srm::gae));
}
