// What the CPU and the CUDA side of token_rewards have in common before any kernel runs.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <string>

#include "packed_sequences.h"

namespace s2srm {

struct RewardValues {
  double positive, negative, match;
};

// Checked and contiguous; a signal of half or bfloat16 has become float, exactly.
struct TokenRewardsInputs {
  enum class Divergence { argmax, rank, margin };
  Divergence divergence;
  Tensor response, signal;
  int64_t top_k;
  double max_margin;

  TokenRewardsInputs(const Tensor& response_in, const Tensor& signal_in, const std::string& name,
               int64_t top_k_in, double max_margin_in)
      : divergence(parse(name)),
        response(response_in),
        signal(signal_in),
        top_k(top_k_in),
        max_margin(round_to(signal_in.scalar_type(), max_margin_in)) {
    check_vector("response", response, response.numel());
    check_vector("signal", signal, response.numel());
    check_same_device("response", response, signal);
    check_integer("response", response);
    if (divergence == Divergence::margin)
      check_floating("signal", signal);
    else
      check_integer("signal", signal);
    const ScalarType type = signal.scalar_type();
    const bool is_short = type == ScalarType::Half || type == ScalarType::BFloat16;
    response = as_contiguous(response, response.scalar_type());
    signal = as_contiguous(signal, is_short ? ScalarType::Float : type);
  }

  ScalarType result_type() const {
    return is_double(signal) ? ScalarType::Double : ScalarType::Float;
  }

  // body(kernel) with the kernel's own Argmax, Rank or Margin for the divergence and the types.
  template <template <typename, typename> class Argmax, template <typename> class Rank,
            template <typename> class Margin, typename Body>
  void visit(const Body& body) const {
    const bool wide = signal.scalar_type() == ScalarType::Long;
    if (divergence == Divergence::margin) {
      if (is_double(signal))
        body(Margin<double>{signal.const_data_ptr<double>(), max_margin});
      else
        body(Margin<float>{signal.const_data_ptr<float>(), static_cast<float>(max_margin)});
    } else if (divergence == Divergence::rank) {
      if (wide)
        body(Rank<int64_t>{signal.const_data_ptr<int64_t>(), top_k});
      else
        body(Rank<int32_t>{signal.const_data_ptr<int32_t>(), top_k});
    } else if (response.scalar_type() == ScalarType::Long) {
      visit_argmax<Argmax, int64_t>(wide, body);
    } else {
      visit_argmax<Argmax, int32_t>(wide, body);
    }
  }

 private:
  template <template <typename, typename> class Argmax, typename Response, typename Body>
  void visit_argmax(bool wide, const Body& body) const {
    const Response* ids = response.const_data_ptr<Response>();
    if (wide)
      body(Argmax<Response, int64_t>{ids, signal.const_data_ptr<int64_t>()});
    else
      body(Argmax<Response, int32_t>{ids, signal.const_data_ptr<int32_t>()});
  }

  static Divergence parse(const std::string& name) {
    if (name == "argmax") return Divergence::argmax;
    if (name == "rank") return Divergence::rank;
    if (name == "margin") return Divergence::margin;
    fail("divergence must be one of ('argmax', 'rank', 'margin'), got '", name, "'");
  }

  // PyTorch rounds a number to half before it compares a half with it; so does this, and the
  // comparison itself can then be made in float.
  static double round_to(ScalarType type, double value) {
    const float single = static_cast<float>(value);
    if (type == ScalarType::Half) return static_cast<float>(c10::Half(single));
    if (type == ScalarType::BFloat16) return static_cast<float>(c10::BFloat16(single));
    return value;
  }
};

}  // namespace s2srm
