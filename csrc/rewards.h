// What the CPU and the CUDA side of token_rewards have in common before any kernel runs.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <string>

#include "segments.h"

namespace s2srm {

enum class Divergence { argmax, rank, margin };

struct RewardValues {
  double positive, negative, match;
};

inline Divergence parse_divergence(const std::string& name) {
  if (name == "argmax") return Divergence::argmax;
  if (name == "rank") return Divergence::rank;
  if (name == "margin") return Divergence::margin;
  fail("divergence must be one of ('argmax', 'rank', 'margin'), got '", name, "'");
}

inline void check_rewards_input(const Tensor& response, const Tensor& signal,
                                Divergence divergence) {
  check_vector("response", response, response.numel());
  check_vector("signal", signal, response.numel());
  check_integer("response", response);
  if (divergence == Divergence::margin)
    check_floating("signal", signal);
  else
    check_integer("signal", signal);
}

// PyTorch compares a half with a number after rounding the number to half; so does this, once, and
// the comparison itself can then be made in float.
inline double round_to(ScalarType type, double value) {
  if (type == ScalarType::Half) return static_cast<float>(c10::Half(static_cast<float>(value)));
  if (type == ScalarType::BFloat16)
    return static_cast<float>(c10::BFloat16(static_cast<float>(value)));
  return value;
}

// The type a signal is read as: half and bfloat16 become float, exactly.
inline ScalarType signal_type(const Tensor& signal) {
  const ScalarType type = signal.scalar_type();
  return type == ScalarType::Half || type == ScalarType::BFloat16 ? ScalarType::Float : type;
}

}  // namespace s2srm
