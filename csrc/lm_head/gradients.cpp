// Gradients from the rows' statistics. Columns are taken a span at a time, and a span goes through
// three phases, each shared out among the threads:
//
//     LogitGradients    logits, made again or kept, into their gradients dz in place
//     HiddenGradient    d_hidden += dz^T W, the columns in order
//     WeightGradient    d_weight = dz X of the span's columns: the rows in order, written once
//
// Every sum has one fixed order, so the results do not depend on the number of threads. Where the
// logits lie in the memory of d_weight the last phase overwrites them, tile by tile.

#include "hidden_gradient.h"
#include "logit_gradient.h"
#include "weight_gradient.h"

namespace s2srm::lm_head {

template <class T>
void gradients(const Head<T>& head, const TileKernels<T>& kernels,
               const Coefficients<T>& coefficients, T* logits, int64_t logits_stride,
               int64_t columns, bool stored, const Outputs<T>& outputs) {
  const int64_t group = stored ? 0 : PackedHidden<T>::capacity(head);
  PackedHidden<T> hidden(head, kernels, group);
  ColumnSpan<T> span{head, kernels, coefficients, outputs, logits_stride};
  LogitGradients<T> logit_gradients(span);
  HiddenGradient<T> hidden_gradient(span);
  WeightGradient<T> weight_gradient(span, logits == outputs.weight);
  for (int64_t first = 0; first < head.num_columns; first += columns) {
    span.first = first;
    span.columns = std::min(columns, head.num_columns - first);
    span.logits = stored ? logits + first * logits_stride : logits;
    if (stored) logit_gradients.replace();
    for (int64_t row = 0; !stored && row < head.num_rows; row += group) {
      if (first == 0 || group < head.num_rows)
        hidden.pack(row, std::min(group, head.num_rows - row));
      logit_gradients.make(hidden, row);
    }
    if (outputs.hidden != nullptr && head.width > 0) hidden_gradient.add();
    if (outputs.weight != nullptr || outputs.bias != nullptr) weight_gradient.run();
  }
}

template void gradients(const Head<float>&, const TileKernels<float>&, const Coefficients<float>&,
                        float*, int64_t, int64_t, bool, const Outputs<float>&);
template void gradients(const Head<double>&, const TileKernels<double>&,
                        const Coefficients<double>&, double*, int64_t, int64_t, bool,
                        const Outputs<double>&);

}  // namespace s2srm::lm_head
