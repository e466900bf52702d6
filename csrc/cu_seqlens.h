// cu_seqlens as a kernel reads it, int32 or int64; for the host and for CUDA, without torch.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define S2SRM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define S2SRM_HOST_DEVICE inline
#endif

namespace s2srm {

struct CuSeqlens {
  const void* data;
  bool wide;  // int64

  S2SRM_HOST_DEVICE int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

}  // namespace s2srm
