// s2srm::gae.cpp on CUDA; gae_kernel.cuh has the algorithm.

#include <tuple>

#include "gae_inputs.h"
#include "gae_kernel.cuh"
#include "launch.cuh"

namespace s2srm {
namespace {

template <typename T>
void run(const GaeInputs& in, const PackedSequences& packed, double gamma, double lam,
         Tensor& advantages, Tensor& returns) {
  using Shape = GaeShape<T>;
  Scan scan(in.rewards, packed);
  const int64_t num_rows = in.rewards.numel();
  const int64_t num_tiles = (num_rows + Shape::kRows - 1) / Shape::kRows;
  uint64_t* words = scan.prepare(num_tiles * Published<double>::kWords, nullptr);
  if (num_tiles > 0) {
    const GaeArguments<T> arguments{
        in.rewards.const_data_ptr<T>(),
        in.values.const_data_ptr<T>(),
        in.bootstrap ? in.bootstrap->const_data_ptr<T>() : nullptr,
        packed.cu_seqlens,
        packed.count,
        num_rows,
        num_tiles,
        static_cast<T>(gamma),
        Decay<T>(gamma * lam, Shape::kWarpRows, Shape::kRows),
        words,
        advantages.mutable_data_ptr<T>(),
        returns.mutable_data_ptr<T>(),
    };
    gae_kernel<T, Shape::kThreads, Shape::kRounds>
        <<<static_cast<unsigned>(num_tiles), Shape::kThreads, 0, scan.stream()>>>(arguments);
  }
  scan.check(num_rows);
}

std::tuple<Tensor, Tensor> gae(const Tensor& rewards, const Tensor& values,
                               const Tensor& cu_seqlens, const Tensor& options,
                               const std::optional<Tensor>& bootstrap) {
  const auto [gamma, lam] = read_options<2>(options);
  const PackedSequences packed(cu_seqlens);
  const GaeInputs in(rewards, values, bootstrap, packed.count);
  Tensor advantages = new_vector(rewards, in.rewards.numel(), in.type);
  Tensor returns = new_vector(rewards, in.rewards.numel(), in.type);
  const auto work = in.type == ScalarType::Double ? run<double> : run<float>;
  work(in, packed, gamma, lam, advantages, returns);
  return {advantages, returns};
}

}  // namespace
}  // namespace s2srm

STABLE_TORCH_LIBRARY_IMPL(s2srm, CUDA, m) {
  m.impl("gae.cpp", TORCH_BOX(&s2srm::gae));
}
