// Elements of hidden, weight and bias, read as the compute type T (float or double), and written.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>

namespace s2srm::lm_head {

enum class Element { kCompute, kHalf, kBFloat16 };  // kCompute: T itself

template <class T, class Source>
void convert(const Source* in, int64_t count, T* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(static_cast<float>(in[i]));
}

template <class T>
void read(Element element, const void* base, int64_t offset, int64_t count, T* out) {
  using torch::headeronly::BFloat16;
  using torch::headeronly::Half;
  if (element == Element::kHalf)
    convert(static_cast<const Half*>(base) + offset, count, out);
  else if (element == Element::kBFloat16)
    convert(static_cast<const BFloat16*>(base) + offset, count, out);
  else
    std::copy_n(static_cast<const T*>(base) + offset, count, out);
}

// Rounded to the nearest.
template <class T>
void write(Element element, const T* in, int64_t count, void* base, int64_t offset) {
  using torch::headeronly::BFloat16;
  using torch::headeronly::Half;
  if (element == Element::kHalf)
    for (int64_t i = 0; i < count; ++i)
      static_cast<Half*>(base)[offset + i] = static_cast<float>(in[i]);
  else if (element == Element::kBFloat16)
    for (int64_t i = 0; i < count; ++i)
      static_cast<BFloat16*>(base)[offset + i] = static_cast<float>(in[i]);
  else
    std::copy_n(in, count, static_cast<T*>(base) + offset);
}

}  // namespace s2srm::lm_head
