// The CUDA kernels of csrc/ behind a C interface, on the emulator: for test_cuda_emulated.py.
// Tiles are small, so that a few thousand rows make many.
#include "cuda_on_cpu.h"

#include "gae_kernel.cuh"
#include "prepare_kernel.cuh"
#include "token_rewards_kernel.cuh"

using namespace s2srm;

namespace {

struct Grid {
  const void* cu_seqlens;
  int wide;
  int64_t num_sequences, num_rows;
  int resident;  // blocks at a time
  unsigned seed;

  CuSeqlens view() const { return {cu_seqlens, wide != 0}; }
};

Report prepare(const Grid& grid, std::vector<uint64_t>& words, int64_t* lengths) {
  Report report;
  for (uint64_t& word : words) word = ~uint64_t(0);  // left over from something else
  const int num_blocks = num_prepare_blocks(grid.num_sequences, int64_t(words.size()));
  const PrepareArguments in{grid.view(), grid.num_sequences, words.data(),
                            int64_t(words.size()), lengths, &report};
  emulator::launch(num_blocks, kPrepareThreads, grid.resident, grid.seed,
                   [=] { prepare_kernel<>(in); });
  for (int i = 1; i < num_blocks; ++i)
    if (report.descent[i] < report.descent[0]) report.descent[0] = report.descent[i];
  return report;
}

template <typename T, int kThreads, int kRounds>
void run_gae(const Grid& grid, const void* rewards, const void* values, const void* bootstrap,
             double gamma, double lam, void* advantages, void* returns, int64_t* report) {
  using Shape = TileShape<kThreads, kRounds>;
  const int64_t num_tiles = (grid.num_rows + Shape::kRows - 1) / Shape::kRows;
  std::vector<uint64_t> words(num_tiles * Published<double>::kWords);
  const Report found = prepare(grid, words, nullptr);
  report[0] = found.first, report[1] = found.descent[0], report[2] = found.last;
  const GaeArguments<T> in{static_cast<const T*>(rewards),
                           static_cast<const T*>(values),
                           static_cast<const T*>(bootstrap),
                           grid.view(),
                           grid.num_sequences,
                           grid.num_rows,
                           num_tiles,
                           static_cast<T>(gamma),
                           Decay<T>(gamma * lam, Shape::kWarpRows, Shape::kRows),
                           words.data(),
                           static_cast<T*>(advantages),
                           static_cast<T*>(returns)};
  emulator::launch(int(num_tiles), kThreads, grid.resident, grid.seed,
                   [=] { gae_kernel<T, kThreads, kRounds>(in); });
}

template <typename Diverges>
void run_rewards(const Grid& grid, const Diverges& diverges, const double* amounts, void* rewards,
                 int64_t* divergence_index, int64_t* report) {
  constexpr int kThreads = 64, kRounds = 2;
  using Shape = TileShape<kThreads, kRounds>;
  using T = typename Diverges::Result;
  const int64_t num_tiles = (grid.num_rows + Shape::kRows - 1) / Shape::kRows;
  std::vector<uint64_t> words(num_tiles);
  const Report found = prepare(grid, words, divergence_index);
  report[0] = found.first, report[1] = found.descent[0], report[2] = found.last;
  const RewardsArguments<Diverges> in{diverges,
                                      grid.view(),
                                      grid.num_sequences,
                                      grid.num_rows,
                                      num_tiles,
                                      static_cast<T>(amounts[0]),
                                      static_cast<T>(-amounts[1]),
                                      static_cast<T>(amounts[2]),
                                      words.data(),
                                      static_cast<T*>(rewards),
                                      divergence_index};
  emulator::launch(int(num_tiles), kThreads, grid.resident, grid.seed,
                   [=] { token_rewards_kernel<Diverges, kThreads, kRounds>(in); });
}

}  // namespace

extern "C" {

// full: the very shape that runs on a GPU.
void gae(const Grid* grid, int is_double, int full, const void* rewards, const void* values,
         const void* bootstrap, double gamma, double lam, void* advantages, void* returns,
         int64_t* report) {
  const auto run = is_double ? (full ? run_gae<double, GaeShape<double>::kThreads,
                                               GaeShape<double>::kRounds>
                                     : run_gae<double, 64, 2>)
                             : (full ? run_gae<float, GaeShape<float>::kThreads,
                                               GaeShape<float>::kRounds>
                                     : run_gae<float, 64, 2>);
  run(*grid, rewards, values, bootstrap, gamma, lam, advantages, returns, report);
}

void token_rewards(const Grid* grid, const char* kind, const void* response, const void* signal,
                   int64_t top_k, double max_margin, const double* amounts, void* rewards,
                   int64_t* divergence_index, int64_t* report) {
  const auto run = [&](const auto& diverges) {
    run_rewards(*grid, diverges, amounts, rewards, divergence_index, report);
  };
  const auto id64 = static_cast<const int64_t*>(response);
  const auto id32 = static_cast<const int32_t*>(response);
  const auto signal64 = static_cast<const int64_t*>(signal);
  const auto signal32 = static_cast<const int32_t*>(signal);
  const std::string name = kind;
  if (name == "argmax64/64") run(ArgmaxDiverges<int64_t, int64_t>{id64, signal64});
  if (name == "argmax64/32") run(ArgmaxDiverges<int64_t, int32_t>{id64, signal32});
  if (name == "argmax32/64") run(ArgmaxDiverges<int32_t, int64_t>{id32, signal64});
  if (name == "argmax32/32") run(ArgmaxDiverges<int32_t, int32_t>{id32, signal32});
  if (name == "rank64") run(RankDiverges<int64_t>{signal64, top_k});
  if (name == "rank32") run(RankDiverges<int32_t>{signal32, top_k});
  if (name == "margin32")
    run(MarginDiverges<float>{static_cast<const float*>(signal), float(max_margin)});
  if (name == "margin64")
    run(MarginDiverges<double>{static_cast<const double*>(signal), max_margin});
}
}
