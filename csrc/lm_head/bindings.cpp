// The operators s2srm::cpu_*: what s2srm_kernels.cpp.engine calls. They write into tensors that the
// engine allocates, check what could lead to an access out of bounds, and leave the rest to it.

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <optional>
#include <string>

#include "../checks.h"
#include "passes.h"
#include "workers.h"

namespace s2srm::lm_head {
namespace {

using Optional = std::optional<Tensor>;

constexpr int64_t kRowPadding = 16;  // no vector of rows is longer

void check(bool holds, const char* what) {
  if (!holds) fail("s2srm cpu operator: ", what);
}

Element element_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half:
      return Element::kHalf;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    default:
      return Element::kCompute;
  }
}

bool has_rows(const Tensor& tensor) { return tensor.size(1) < 2 || tensor.stride(1) == 1; }

// The data of a contiguous tensor of T with `size` elements; null for an absent one.
template <class T>
T* data(const Optional& tensor, int64_t size, const char* what) {
  if (!tensor) return nullptr;
  constexpr ScalarType type = sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double;
  check(tensor->scalar_type() == type && tensor->is_contiguous() && tensor->numel() == size, what);
  return static_cast<T*>(tensor->data_ptr());
}

// Asks for huge pages below a large tensor that is about to be written for the first time: page
// faults of 4 KiB cost up to a fifth of the products that fill it. [measured]
void prefer_huge_pages(const Optional& tensor) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 2 << 20;
  if (!tensor || tensor->dim() != 2) return;
  const auto begin = reinterpret_cast<uintptr_t>(tensor->data_ptr());
  const int64_t size = is_double(*tensor) ? 8 : element_of(*tensor) == Element::kCompute ? 4 : 2;
  const int64_t bytes = tensor->size(0) * tensor->stride(0) * size;
  const uintptr_t first = (begin + page - 1) / page * page, last = (begin + bytes) / page * page;
  // Advice: where the system does not take it, nothing is lost.
  if (first < last) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)tensor;
#endif
}

template <class T>
Head<T> make_head(const Tensor& hidden, const Tensor& rows, const Tensor& weight,
                  const Optional& bias, const Tensor& target, double softcap, double temperature) {
  check(hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1) &&
            has_rows(hidden) && has_rows(weight) && weight.size(0) > 0,
        "hidden and weight must be (N, D) and (V, D) with contiguous rows");
  check(hidden.scalar_type() == weight.scalar_type(), "hidden and weight must have one dtype");
  check(!bias || (bias->scalar_type() == weight.scalar_type() && bias->is_contiguous() &&
                  bias->numel() == weight.size(0)),
        "bias must be (V,), contiguous, of weight's dtype");
  check(rows.scalar_type() == ScalarType::Long && target.scalar_type() == ScalarType::Long &&
            rows.is_contiguous() && target.is_contiguous() && rows.numel() == target.numel(),
        "rows and target must be (R,) int64");
  Head<T> head;
  head.element = element_of(hidden);
  head.hidden = hidden.const_data_ptr();
  head.hidden_stride = hidden.stride(0);
  head.rows = static_cast<const int64_t*>(rows.const_data_ptr());
  head.num_rows = rows.numel();
  head.weight = weight.const_data_ptr();
  head.weight_stride = weight.stride(0);
  head.num_columns = weight.size(0);
  head.width = weight.size(1);
  head.bias = bias ? bias->const_data_ptr() : nullptr;
  head.target = static_cast<const int64_t*>(target.const_data_ptr());
  head.softcap = static_cast<T>(softcap);
  head.temperature = static_cast<T>(temperature);
  for (int64_t r = 0; r < head.num_rows; ++r)
    check(head.rows[r] >= 0 && head.rows[r] < hidden.size(0) &&
              head.target[r] < head.num_columns,
          "rows or target out of range");
  return head;
}

// The best kernels that the processor runs, or those that S2SRM_CPU_KERNELS names.
template <class T>
const TileKernels<T>& chosen_kernels() {
  static const TileKernels<T>* const chosen = [] {
    const char* name = std::getenv("S2SRM_CPU_KERNELS");
    const TileKernels<T>* kernels = tile_kernels<T>(name);
    if (kernels == nullptr)
      fail("S2SRM_CPU_KERNELS must be avx512, avx2 or baseline and run on this processor, got ",
           name);
    return kernels;
  }();
  return *chosen;
}

// Calls run with a Head of the compute type of hidden's dtype.
template <class Run>
void with_head(const Tensor& hidden, const Tensor& rows, const Tensor& weight,
               const Optional& bias, const Tensor& target, double softcap, double temperature,
               const Run& run) {
  if (is_double(hidden))
    run(make_head<double>(hidden, rows, weight, bias, target, softcap, temperature),
        chosen_kernels<double>());
  else
    run(make_head<float>(hidden, rows, weight, bias, target, softcap, temperature),
        chosen_kernels<float>());
}

void run_target_logits(const Tensor& hidden, const Tensor& rows, const Tensor& weight,
                       const Optional& bias, const Tensor& target, double softcap,
                       double temperature, Tensor& out) {
  with_head(hidden, rows, weight, bias, target, softcap, temperature,
            [&]<class T>(const Head<T>& head, const TileKernels<T>& kernels) {
              target_logits(head, kernels, data<T>(out, head.num_rows, "out must be (R,)"));
            });
}

template <class T>
T* logits_data(const Optional& logits, int64_t num_rows) {
  if (!logits) return nullptr;
  constexpr ScalarType type = sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double;
  check(logits->scalar_type() == type && logits->dim() == 2 && has_rows(*logits) &&
            logits->size(1) >= ceil_div(num_rows, kRowPadding) * kRowPadding &&
            logits->stride(0) >= logits->size(1),
        "logits must be (columns, R rounded up to a multiple of 16)");
  return static_cast<T*>(logits->data_ptr());
}

void run_statistics(const Tensor& hidden, const Tensor& rows, const Tensor& weight,
                    const Optional& bias, const Tensor& target, double softcap, double temperature,
                    const Optional& at_target, bool entropy, bool mean, Tensor& packed,
                    Optional tile_lse, Optional logits) {
  with_head(hidden, rows, weight, bias, target, softcap, temperature,
            [&]<class T>(const Head<T>& head, const TileKernels<T>& kernels) {
              const int64_t n = head.num_rows;
              const int64_t tiles = ceil_div(head.num_columns, kTileColumns);
              check(!logits || logits->size(0) == head.num_columns, "logits must have V rows");
              prefer_huge_pages(logits);
              statistics(head, kernels, data<T>(at_target, n, "target_logits must be (R,)"),
                         (entropy ? kWantedEntropy : 0) | (mean ? kWantedMean : 0),
                         data<T>(packed, n * kPackedStatistics, "packed must be (R, 7)"),
                         data<T>(tile_lse, n * tiles, "tile_lse must be (R, T)"),
                         logits_data<T>(logits, n), logits ? logits->stride(0) : 0);
            });
}

// packed: its field 4 is the logit of the column drawn.
void run_sample(const Tensor& hidden, const Tensor& rows, const Tensor& weight,
                const Optional& bias, const Tensor& target, double softcap, double temperature,
                const Optional& seeds, const Optional& positions, int64_t first_id,
                const Optional& suppressed, Tensor& packed, Tensor& perturbed, Tensor& columns) {
  with_head(hidden, rows, weight, bias, target, softcap, temperature,
            [&]<class T>(const Head<T>& head, const TileKernels<T>& kernels) {
              const int64_t n = head.num_rows;
              const auto keys = [&](const Optional& tensor) -> const int64_t* {
                if (!tensor) return nullptr;
                check(tensor->scalar_type() == ScalarType::Long && tensor->is_contiguous() &&
                          tensor->numel() == n,
                      "seeds and positions must be (R,) int64");
                return static_cast<const int64_t*>(tensor->const_data_ptr());
              };
              check(seeds.has_value() == positions.has_value(), "seeds go with positions");
              check(columns.scalar_type() == ScalarType::Long && columns.is_contiguous() &&
                        columns.numel() == n,
                    "columns must be (R,) int64");
              check(!suppressed || (suppressed->scalar_type() == ScalarType::Bool &&
                                    suppressed->is_contiguous() &&
                                    suppressed->numel() == head.num_columns),
                    "suppressed must be (V,) bool");
              T* statistics_data =
                  data<T>(packed, n * kPackedStatistics, "packed must be (R, 7)");
              const Draws<T> draws = {
                  keys(seeds), keys(positions), first_id,
                  suppressed ? static_cast<const bool*>(suppressed->const_data_ptr()) : nullptr,
                  data<T>(perturbed, n, "perturbed must be (R,)"), statistics_data + 4,
                  kPackedStatistics, static_cast<int64_t*>(columns.data_ptr())};
              statistics<T>(head, kernels, nullptr, 0, statistics_data, nullptr, nullptr, 0,
                            &draws);
            });
}

// The noise of one row, for its test.
void run_noise(int64_t seed, int64_t position, int64_t first_id, Tensor& out) {
  float* values = data<float>(out, out.numel(), "out must be float32");
  chosen_kernels<float>().noise(seed, position, first_id, out.numel(), values);
}

// coefficients: (8, R) max_logit, log_sum, log_sum_low, entropy, then the upstream gradients of
// log p(target), entropy, lse and mean log p; `given` says which of the last three are there.
template <class T>
Coefficients<T> make_coefficients(const Tensor& coefficients, int64_t given, int64_t num_total,
                                  const Optional& kept, const Optional& entry_columns,
                                  const Optional& entry_values, const Head<T>& head) {
  const int64_t n = head.num_rows;
  const T* base = data<T>(coefficients, 8 * n, "coefficients must be (8, R)");
  const auto field = [&](int64_t i) {
    return i < 5 || (given >> (i - 5)) & 1 ? base + i * n : nullptr;
  };
  const bool* blocks = nullptr;
  if (kept) {
    check(kept->scalar_type() == ScalarType::Bool && kept->is_contiguous() && kept->dim() == 2 &&
              kept->size(0) >= ceil_div(n, kBlockRows) &&
              kept->size(1) == ceil_div(head.num_columns, kTileColumns),
          "kept must be (>= ceil(R / 128), ceil(V / 256)) bool");
    blocks = static_cast<const bool*>(kept->const_data_ptr());
  }
  Coefficients<T> made = {field(0), field(1), field(2),  field(3), field(4),
                          field(5), field(6), field(7),  num_total, blocks,
                          kept ? kept->size(1) : 0, 0,   nullptr,  nullptr};
  if (entry_columns) {
    check(entry_columns->scalar_type() == ScalarType::Long && entry_columns->is_contiguous() &&
              entry_columns->dim() == 2 && entry_columns->size(0) == n && entry_values.has_value(),
          "entry_columns must be (R, K) int64, with values");
    made.num_entries = entry_columns->size(1);
    made.entry_columns = static_cast<const int64_t*>(entry_columns->const_data_ptr());
    made.entry_values =
        data<T>(entry_values, entry_columns->numel(), "entry_values must be (R, K)");
  }
  return made;
}

void run_gradients(const Tensor& hidden, const Tensor& rows, const Tensor& weight,
                   const Optional& bias, const Tensor& target, double softcap, double temperature,
                   const Tensor& coefficients, int64_t given, int64_t num_total,
                   const Optional& kept, const Optional& entry_columns,
                   const Optional& entry_values, Tensor& logits, bool stored, bool accumulate,
                   Optional d_hidden, Optional d_weight, Optional d_bias) {
  constexpr int64_t kStoredSpan = 32 * kTileColumns;
  with_head(hidden, rows, weight, bias, target, softcap, temperature,
            [&]<class T>(const Head<T>& head, const TileKernels<T>& kernels) {
              const int64_t size = head.num_columns * head.width;
              Outputs<T> out;
              out.hidden =
                  data<T>(d_hidden, hidden.size(0) * head.width, "d_hidden must be (N, D)");
              out.weight = d_weight ? d_weight->data_ptr() : nullptr;
              out.weight_element = d_weight ? element_of(*d_weight) : Element::kCompute;
              check(!d_weight || (d_weight->is_contiguous() && d_weight->numel() == size),
                    "d_weight must be (V, D)");
              check(!accumulate || out.weight_element == Element::kCompute,
                    "d_weight must be of the compute dtype to be added to");
              out.bias = data<T>(d_bias, head.num_columns, "d_bias must be (V,)");
              out.accumulate = accumulate;
              check(!stored || logits.size(0) == head.num_columns, "logits must have V rows");
              prefer_huge_pages(d_weight);
              const auto inputs = make_coefficients(coefficients, given, num_total, kept,
                                                    entry_columns, entry_values, head);
              gradients(head, kernels, inputs, logits_data<T>(logits, head.num_rows),
                        logits.stride(0), stored ? kStoredSpan : logits.size(0), stored, out);
            });
}

// exp or tanh as the kernels compute them, for their test.
void run_elementwise(const Tensor& x, const std::string& function, Tensor& out) {
  const int64_t count = x.numel();
  check(function == "exp" || function == "tanh", "function must be exp or tanh");
  const auto run = [&]<class T>(const TileKernels<T>& kernels) {
    const auto elementwise = function == "exp" ? kernels.exp : kernels.tanh;
    elementwise(count, data<T>(x, count, "x must be contiguous"),
                data<T>(out, count, "out must be like x"));
  };
  if (is_double(x))
    run(chosen_kernels<double>());
  else
    run(chosen_kernels<float>());
}

}  // namespace
}  // namespace s2srm::lm_head

#define S2SRM_HEAD                                                                    \
  "Tensor hidden, Tensor rows, Tensor weight, Tensor? bias, Tensor target, float softcap, " \
  "float temperature"

STABLE_TORCH_LIBRARY_FRAGMENT(s2srm, m) {
  m.def("cpu_target_logits(" S2SRM_HEAD ", Tensor(a!) out) -> ()");
  m.def("cpu_statistics(" S2SRM_HEAD
        ", Tensor? target_logits, bool entropy, bool mean, Tensor(a!) packed,"
        " Tensor(b!)? tile_lse, Tensor(c!)? logits) -> ()");
  m.def("cpu_sample(" S2SRM_HEAD
        ", Tensor? seeds, Tensor? positions, int first_id, Tensor? suppressed, Tensor(a!) packed,"
        " Tensor(b!) perturbed, Tensor(c!) columns) -> ()");
  m.def("cpu_noise(int seed, int position, int first_id, Tensor(a!) out) -> ()");
  m.def("cpu_gradients(" S2SRM_HEAD
        ", Tensor coefficients, int given, int num_total, Tensor? kept, Tensor? entry_columns,"
        " Tensor? entry_values, Tensor(a!) logits, bool stored, bool accumulate,"
        " Tensor(b!)? d_hidden, Tensor(c!)? d_weight, Tensor(d!)? d_bias) -> ()");
  m.def("cpu_elementwise(Tensor x, str function, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(s2srm, CPU, m) {
  m.impl("cpu_target_logits", TORCH_BOX(&s2srm::lm_head::run_target_logits));
  m.impl("cpu_statistics", TORCH_BOX(&s2srm::lm_head::run_statistics));
  m.impl("cpu_sample", TORCH_BOX(&s2srm::lm_head::run_sample));
  m.impl("cpu_noise", TORCH_BOX(&s2srm::lm_head::run_noise));
  m.impl("cpu_gradients", TORCH_BOX(&s2srm::lm_head::run_gradients));
  m.impl("cpu_elementwise", TORCH_BOX(&s2srm::lm_head::run_elementwise));
}
