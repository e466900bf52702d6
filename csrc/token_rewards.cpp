// s2srm::token_rewards.cpp on the CPU: forwards through each sequence, sequences in parallel.
//
//     r_t = +positive  t < k;   -negative  t >= k, not agree_t;   match  t >= k, agree_t
//
// with k the first row that does not agree, the sequence's length where all do.

#include <tuple>

#include "token_rewards_inputs.h"
#include "packed_sequences.h"

namespace s2srm {
namespace {

// Each answers for row t. NaN does not agree.
template <typename Response, typename Signal>
struct ArgmaxAgrees {
  const Response* response;
  const Signal* signal;
  bool operator()(int64_t t) const { return static_cast<int64_t>(response[t]) == signal[t]; }
};

template <typename Signal>
struct RankAgrees {
  const Signal* signal;
  int64_t top_k;
  bool operator()(int64_t t) const { return signal[t] < top_k; }
};

template <typename Signal>
struct MarginAgrees {
  const Signal* signal;
  Signal max_margin;
  bool operator()(int64_t t) const { return signal[t] <= max_margin; }
};

template <typename T, typename Agrees>
void run(const Agrees& agrees, const PackedSequences& packed, const RewardValues& values,
         Tensor& rewards, Tensor& divergence_index) {
  T* out = rewards.mutable_data_ptr<T>();
  int64_t* index = divergence_index.mutable_data_ptr<int64_t>();
  const T positive = static_cast<T>(values.positive);
  const T negative = static_cast<T>(-values.negative), match = static_cast<T>(values.match);
  for_each_sequence(packed, rewards.numel(), [&](int64_t b) {
    const int64_t start = packed.cu_seqlens[b], end = packed.cu_seqlens[b + 1];
    int64_t t = start;
    for (; t < end && agrees(t); ++t) out[t] = positive;
    index[b] = t - start;
    for (; t < end; ++t) out[t] = agrees(t) ? match : negative;
  });
}

std::tuple<Tensor, Tensor> token_rewards(const Tensor& response, const Tensor& signal,
                                         const Tensor& cu_seqlens, const Tensor& options,
                                         const std::string& divergence, int64_t top_k) {
  const auto [max_margin, positive, negative, match] = read_options<4>(options);
  const PackedSequences packed(cu_seqlens);
  const TokenRewardsInputs in(response, signal, divergence, top_k, max_margin);
  check_cu_seqlens(packed, in.signal);
  Tensor rewards = new_vector(signal, in.signal.numel(), in.result_type());
  Tensor index = new_vector(signal, packed.count, ScalarType::Long);
  const RewardValues values{positive, negative, match};
  in.visit<ArgmaxAgrees, RankAgrees, MarginAgrees>([&](const auto& agrees) {
    if (in.result_type() == ScalarType::Double)
      run<double>(agrees, packed, values, rewards, index);
    else
      run<float>(agrees, packed, values, rewards, index);
  });
  return {rewards, index};
}

}  // namespace
}  // namespace s2srm

STABLE_TORCH_LIBRARY_IMPL(s2srm, CPU, m) {
  m.impl("token_rewards.cpp", TORCH_BOX(&s2srm::token_rewards));
}
