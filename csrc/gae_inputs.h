// What the CPU and the CUDA side of gae have in common before any kernel runs.
#pragma once

#include "packed_sequences.h"

namespace s2srm {

// Checked, contiguous and of the result's type: float64 if any of them is, else float32.
struct GaeInputs {
  ScalarType type = ScalarType::Float;
  Tensor rewards, values;
  std::optional<Tensor> bootstrap;

  GaeInputs(const Tensor& rewards_in, const Tensor& values_in,
                  const std::optional<Tensor>& bootstrap_in, int64_t num_sequences)
      : rewards(rewards_in), values(values_in), bootstrap(bootstrap_in) {
    prepare("rewards", rewards, rewards.numel());
    prepare("values", values, rewards.numel());
    if (bootstrap) prepare("bootstrap", *bootstrap, num_sequences);
    rewards = as_contiguous(rewards, type);
    values = as_contiguous(values, type);
    if (bootstrap) bootstrap = as_contiguous(*bootstrap, type);
  }

 private:
  void prepare(const char* name, const Tensor& tensor, int64_t size) {
    check_vector(name, tensor, size);
    check_floating(name, tensor);
    check_same_device(name, tensor, rewards);
    if (is_double(tensor)) type = ScalarType::Double;
  }
};

}  // namespace s2srm
