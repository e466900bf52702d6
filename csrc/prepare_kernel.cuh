// The small kernel before each scan: it checks cu_seqlens, clears the words between tiles and gives
// every sequence its length as divergence index. The host waits for this one alone.
#pragma once

#include "scan.cuh"

namespace s2srm {

constexpr int kPrepareThreads = 256;
constexpr int kMostReports = 1024;

// What the host reads afterwards. Each block reports for itself, so that no atomic is needed.
struct Report {
  int64_t first, last;            // cu_seqlens[0] and [B]
  int64_t descent[kMostReports];  // by block: the smallest b with cu[b] > cu[b + 1], else INT64_MAX
};

struct PrepareArguments {
  CuSeqlens cu_seqlens;
  int64_t num_sequences;
  uint64_t* words;  // (num_words,)
  int64_t num_words;
  int64_t* lengths;  // (B,) or null
  Report* report;
};

inline int num_prepare_blocks(int64_t num_sequences, int64_t num_words) {
  const int64_t items = num_sequences > num_words ? num_sequences : num_words;
  const int64_t blocks = (items + 4 * kPrepareThreads - 1) / (4 * kPrepareThreads);
  return static_cast<int>(blocks < 1 ? 1 : blocks < kMostReports ? blocks : kMostReports);
}

template <int kThreads = kPrepareThreads>
__global__ void __launch_bounds__(kThreads) prepare_kernel(const PrepareArguments in) {
  __shared__ int64_t warp_descent[kThreads / kLanes];
  const int thread = threadIdx.x, lane = thread % kLanes;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kThreads + thread;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = begin; i < in.num_words; i += stride) in.words[i] = 0;

  int64_t descent = INT64_MAX;
  for (int64_t b = begin; b < in.num_sequences; b += stride) {
    const int64_t length = in.cu_seqlens[b + 1] - in.cu_seqlens[b];
    if (length < 0 && b < descent) descent = b;
    if (in.lengths != nullptr) in.lengths[b] = length;
  }
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    const int64_t other = __shfl_down_sync(kAllLanes, descent, distance);
    descent = other < descent ? other : descent;
  }
  if (lane == 0) warp_descent[thread / kLanes] = descent;
  __syncthreads();
  if (thread != 0) return;
  for (int w = 0; w < kThreads / kLanes; ++w)
    descent = warp_descent[w] < descent ? warp_descent[w] : descent;
  in.report->descent[blockIdx.x] = descent;
  if (blockIdx.x == 0) {
    in.report->first = in.cu_seqlens[0];
    in.report->last = in.cu_seqlens[in.num_sequences];
  }
}

}  // namespace s2srm
