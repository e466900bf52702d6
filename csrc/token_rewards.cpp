// s2srm::token_rewards.cpp on the CPU: forwards through each sequence, sequences in parallel.
//
//     r_t = +positive  t < k;   -negative  t >= k, not agree_t;   match  t >= k, agree_t
//
// with k the first row that does not agree, the sequence's length where all do.

#include <tuple>

#include "rewards.h"
#include "sequences.h"

namespace s2srm {
namespace {

// Calls body(agrees) with agrees(t) for the types at hand. NaN does not agree.
template <typename Body>
void visit_agreement(const Tensor& response, const Tensor& signal, Divergence divergence,
                     int64_t top_k, double max_margin, const Body& body) {
  const bool wide_signal = signal.scalar_type() == ScalarType::Long;
  const auto compare = [&](const auto* ids, const auto* best) {
    body([=](int64_t t) { return static_cast<int64_t>(ids[t]) == best[t]; });
  };
  const auto compare_with = [&](const auto* ids) {
    if (wide_signal)
      compare(ids, signal.const_data_ptr<int64_t>());
    else
      compare(ids, signal.const_data_ptr<int32_t>());
  };
  const auto rank_below = [&](const auto* rank) {
    body([=](int64_t t) { return rank[t] < top_k; });
  };
  const auto within = [&](const auto* margin) {
    body([=, bound = static_cast<std::decay_t<decltype(*margin)>>(max_margin)](int64_t t) {
      return margin[t] <= bound;
    });
  };
  if (divergence == Divergence::margin) {
    if (is_double(signal))
      within(signal.const_data_ptr<double>());
    else
      within(signal.const_data_ptr<float>());
  } else if (divergence == Divergence::rank) {
    if (wide_signal)
      rank_below(signal.const_data_ptr<int64_t>());
    else
      rank_below(signal.const_data_ptr<int32_t>());
  } else if (response.scalar_type() == ScalarType::Long) {
    compare_with(response.const_data_ptr<int64_t>());
  } else {
    compare_with(response.const_data_ptr<int32_t>());
  }
}

template <typename T, typename Agrees>
void run(const Agrees& agrees, const Segments& segments, const RewardValues& values,
         Tensor& rewards, Tensor& divergence_index) {
  T* out = rewards.mutable_data_ptr<T>();
  int64_t* index = divergence_index.mutable_data_ptr<int64_t>();
  const T positive = static_cast<T>(values.positive);
  const T negative = static_cast<T>(-values.negative), match = static_cast<T>(values.match);
  for_each_sequence(segments, rewards.numel(), [&](int64_t b) {
    const int64_t start = segments.offsets[b], end = segments.offsets[b + 1];
    int64_t t = start;
    for (; t < end && agrees(t); ++t) out[t] = positive;
    index[b] = t - start;
    for (; t < end; ++t) out[t] = agrees(t) ? match : negative;
  });
}

std::tuple<Tensor, Tensor> token_rewards(const Tensor& response, const Tensor& signal,
                                         const Tensor& cu_seqlens, const std::string& divergence,
                                         int64_t top_k, double max_margin, double positive,
                                         double negative, double match) {
  const int64_t num_rows = response.numel();
  const Segments segments(cu_seqlens);
  const Divergence kind = parse_divergence(divergence);
  check_rewards_input(response, signal, kind);
  check_cu_seqlens(segments, num_rows);

  const RewardValues values{positive, negative, match};
  const ScalarType type = is_double(signal) ? ScalarType::Double : ScalarType::Float;
  Tensor rewards = new_vector(signal, num_rows, type);
  Tensor index = new_vector(signal, segments.count, ScalarType::Long);
  const Tensor tokens = as_contiguous(response, response.scalar_type());
  const Tensor read = as_contiguous(signal, signal_type(signal));
  visit_agreement(tokens, read, kind, top_k, round_to(signal.scalar_type(), max_margin),
                  [&](const auto& agrees) {
                    if (type == ScalarType::Double)
                      run<double>(agrees, segments, values, rewards, index);
                    else
                      run<float>(agrees, segments, values, rewards, index);
                  });
  return {rewards, index};
}

}  // namespace
}  // namespace s2srm

STABLE_TORCH_LIBRARY_IMPL(s2srm, CPU, m) {
  m.impl("token_rewards.cpp", TORCH_BOX(&s2srm::token_rewards));
}
