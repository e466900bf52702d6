// Checks of arguments and small helpers that every operator shares, on torch's stable interface.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace s2srm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Arrives in Python as ValueError: pybind11 translates std::invalid_argument so.
template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

// One value for each of `size` rows. The Python functions say more; this guards the raw operators,
// so that no shape can lead to an access out of bounds.
inline void check_vector(const char* name, const Tensor& tensor, int64_t size) {
  if (tensor.dim() != 1 || tensor.size(0) != size)
    fail(name, " must have shape (", size, ",), got ", tensor.dim(), " dimensions and ",
         tensor.numel(), " values");
}

inline void check_same_device(const char* name, const Tensor& tensor, const Tensor& like) {
  if (tensor.is_cuda() != like.is_cuda() || tensor.get_device_index() != like.get_device_index())
    fail(name, " must be on the same device as the rows");
}

inline void check_integer(const char* name, const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  if (type != ScalarType::Int && type != ScalarType::Long)
    fail(name, " must be int64 or int32, got ", torch::headeronly::toString(type));
}

inline void check_floating(const char* name, const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  if (type != ScalarType::Half && type != ScalarType::BFloat16 && type != ScalarType::Float &&
      type != ScalarType::Double)
    fail(name, " must be floating, got ", torch::headeronly::toString(type));
}

// The tensor itself where it already is `type` and contiguous.
inline Tensor as_contiguous(const Tensor& tensor, ScalarType type) {
  const Tensor cast = tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
  return cast.is_contiguous() ? cast : torch::stable::contiguous(cast);
}

// The numeric options of a call, in the order that Python packed them (s2srm_kernels/options.py).
template <size_t count>
std::array<double, count> read_options(const Tensor& options) {
  if (options.is_cuda() || options.scalar_type() != ScalarType::Double ||
      !options.is_contiguous() || options.dim() != 1 || options.size(0) != count)
    fail("options must be (", count, ",) float64 on the CPU");
  std::array<double, count> values;
  std::copy_n(options.const_data_ptr<double>(), count, values.begin());
  return values;
}

inline bool is_double(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double;
}

inline Tensor new_vector(const Tensor& like, int64_t size, ScalarType type) {
  return torch::stable::empty({&size, 1}, type, std::nullopt, like.device());
}

}  // namespace s2srm
