// s2srm::token_rewards.cpp on CUDA; token_rewards_kernel.cuh has the algorithm.

#include <tuple>

#include "launch.cuh"
#include "token_rewards_inputs.h"
#include "token_rewards_kernel.cuh"

namespace s2srm {
namespace {

template <typename Diverges>
void run(const Diverges& diverges, const PackedSequences& packed, const RewardValues& values,
         Tensor& rewards, Tensor& divergence_index) {
  using Shape = RewardsShape;
  using T = typename Diverges::Result;
  Scan scan(rewards, packed);
  const int64_t num_rows = rewards.numel();
  const int64_t num_tiles = (num_rows + Shape::kRows - 1) / Shape::kRows;
  int64_t* index = divergence_index.mutable_data_ptr<int64_t>();
  uint64_t* words = scan.prepare(num_tiles, index);
  if (num_tiles > 0) {
    const RewardsArguments<Diverges> arguments{
        diverges,
        packed.cu_seqlens,
        packed.count,
        num_rows,
        num_tiles,
        static_cast<T>(values.positive),
        static_cast<T>(-values.negative),
        static_cast<T>(values.match),
        words,
        rewards.mutable_data_ptr<T>(),
        index,
    };
    token_rewards_kernel<Diverges, Shape::kThreads, Shape::kRounds>
        <<<static_cast<unsigned>(num_tiles), Shape::kThreads, 0, scan.stream()>>>(arguments);
  }
  scan.check(num_rows);
}

std::tuple<Tensor, Tensor> token_rewards(const Tensor& response, const Tensor& signal,
                                         const Tensor& cu_seqlens, const Tensor& options,
                                         const std::string& divergence, int64_t top_k) {
  const auto [max_margin, positive, negative, match] = read_options<4>(options);
  const PackedSequences packed(cu_seqlens);
  const TokenRewardsInputs in(response, signal, divergence, top_k, max_margin);
  Tensor rewards = new_vector(signal, in.signal.numel(), in.result_type());
  Tensor index = new_vector(signal, packed.count, ScalarType::Long);
  const RewardValues values{positive, negative, match};
  in.visit<ArgmaxDiverges, RankDiverges, MarginDiverges>(
      [&](const auto& diverges) { run(diverges, packed, values, rewards, index); });
  return {rewards, index};
}

}  // namespace
}  // namespace s2srm

STABLE_TORCH_LIBRARY_IMPL(s2srm, CUDA, m) {
  m.impl("token_rewards.cpp", TORCH_BOX(&s2srm::token_rewards));
}
