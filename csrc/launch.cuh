// The host's side of both scans: scratch memory, the two launches, and what became of cu_seqlens.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <map>

#include "prepare_kernel.cuh"
#include "packed_sequences.h"

namespace s2srm {

inline void check_cuda(cudaError_t error) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("CUDA error: ") + cudaGetErrorString(error));
}

// Page-locked memory that the device writes and the host reads, and an event to wait for. One for
// each device and host thread, never freed: at a thread's end the CUDA context may be gone.
struct Mailbox {
  Report* report = nullptr;
  cudaEvent_t written = nullptr;

  static Mailbox& of_device(int32_t device) {
    thread_local std::map<int32_t, Mailbox> mailboxes;
    Mailbox& mailbox = mailboxes[device];
    if (mailbox.written == nullptr) {
      void* memory = nullptr;
      check_cuda(cudaHostAlloc(&memory, sizeof(Report), cudaHostAllocMapped));
      mailbox.report = static_cast<Report*>(memory);
      check_cuda(cudaEventCreateWithFlags(&mailbox.written, cudaEventDisableTiming));
    }
    return mailbox;
  }
};

// Makes the tensor's device current, prepares a scan and, after its launch, reports bad cu_seqlens.
class Scan {
 public:
  Scan(const Tensor& rows, const PackedSequences& packed)
      : packed_(packed),
        device_(rows.get_device_index()),
        guard_(device_),
        mailbox_(Mailbox::of_device(device_)) {
    check_same_device("cu_seqlens", packed.tensor, rows);
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

  // Zeros for the scan to publish in; checks cu_seqlens on the way, and fills `lengths` if given.
  uint64_t* prepare(int64_t num_words, int64_t* lengths) {
    words_ = new_vector(packed_.tensor, num_words, ScalarType::Long);
    uint64_t* words = static_cast<uint64_t*>(words_->mutable_data_ptr());
    num_blocks_ = num_prepare_blocks(packed_.count, num_words);
    prepare_kernel<><<<num_blocks_, kPrepareThreads, 0, stream_>>>(
        {packed_.cu_seqlens, packed_.count, words, num_words, lengths, mailbox_.report});
    check_cuda(cudaGetLastError());
    check_cuda(cudaEventRecord(mailbox_.written, stream_));
    return words;
  }

  // Waits for `prepare`, not for the scan that was launched behind it. A scan over bad cu_seqlens
  // has touched nothing but its own results.
  void check(int64_t num_rows) {
    check_cuda(cudaGetLastError());
    check_cuda(cudaEventSynchronize(mailbox_.written));
    const Report& report = *mailbox_.report;
    if (report.first != 0) fail_start(report.first);
    int64_t descent = INT64_MAX;
    for (int i = 0; i < num_blocks_; ++i) descent = std::min(descent, report.descent[i]);
    if (descent != INT64_MAX) fail_descent(descent, fetch(descent), fetch(descent + 1));
    if (report.last != num_rows) fail_end(num_rows, report.last);
  }

 private:
  int64_t fetch(int64_t at) const {
    const size_t size = packed_.cu_seqlens.wide ? sizeof(int64_t) : sizeof(int32_t);
    const char* source = static_cast<const char*>(packed_.cu_seqlens.data) + at * size;
    int64_t value = 0;
    check_cuda(cudaMemcpyAsync(&value, source, size, cudaMemcpyDeviceToHost, stream_));
    check_cuda(cudaStreamSynchronize(stream_));
    return CuSeqlens{&value, packed_.cu_seqlens.wide}[0];
  }

  const PackedSequences& packed_;
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  Mailbox& mailbox_;
  cudaStream_t stream_ = nullptr;
  std::optional<Tensor> words_;
  int num_blocks_ = 0;
};

}  // namespace s2srm
