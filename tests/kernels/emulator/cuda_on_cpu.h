// Enough of CUDA's language for csrc/*_kernel.cuh to run on a CPU, unchanged, compiled by g++.
//
// A block is an operating system's thread, so that blocks truly run at the same time and wait for
// each other; its CUDA threads are fibers of that thread, switched at the collectives alone. Shared
// memory is the block's own by being thread_local. Blocks start in the order of their index, as on
// a GPU, and as many at a time as the caller asks for.
//
// What it cannot show: races within a warp between two collectives, and the weaker memory order of
// a GPU. What it can: every index, every edge, the carries, deadlocks, and whether bits depend on
// the timing.
#pragma once

#include <sched.h>
#include <setjmp.h>
#include <ucontext.h>

#include <atomic>
#include <chrono>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local

struct Index {
  unsigned x = 0;
};

namespace emulator {

// Where fibers wait until all of a group have come. Two sets of slots: the first to leave may come
// again before the last has read.
struct Meeting {
  int size = 0, arrived = 0;
  unsigned round = 0;
  uint64_t slots[2][32];
};

struct Block {
  struct Fiber {
    ucontext_t context;  // to enter by; setjmp afterwards, which makes no system call
    jmp_buf resume;
    std::unique_ptr<char[]> stack;
    bool started = false, done = false;
  };
  std::vector<Fiber> fibers;
  std::vector<Meeting> warps;
  Meeting all;
  jmp_buf scheduler;
  const std::function<void()>* kernel = nullptr;
  std::minstd_rand random;
};

inline thread_local Block* block;
inline thread_local int current;

// Functions of their own: what stands in the caller's registers survives.
[[gnu::noinline]] inline void yield() {
  if (_setjmp(block->fibers[current].resume) == 0) _longjmp(block->scheduler, 1);
}

[[gnu::noinline]] inline void resume(Block::Fiber& fiber) {
  if (_setjmp(block->scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

[[noreturn]] inline void give_up(const char* why) {
  std::fprintf(stderr, "emulator: %s\n", why);
  std::abort();
}

inline unsigned meet(Meeting& meeting) {
  const unsigned round = meeting.round;
  if (++meeting.arrived == meeting.size) {
    meeting.arrived = 0;
    ++meeting.round;
  }
  const auto since = std::chrono::steady_clock::now();
  for (long i = 1; meeting.round == round; ++i) {
    yield();
    if (i % 65536 == 0 && std::chrono::steady_clock::now() - since > std::chrono::minutes(2))
      give_up("some threads never came to a collective");
  }
  return round & 1;
}

// Every lane's value, by lane.
template <typename T>
const uint64_t* exchange(unsigned mask, T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  if (mask != 0xffffffffu) give_up("a collective of part of a warp");
  Meeting& warp = block->warps[current / 32];
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  warp.slots[warp.round & 1][current % 32] = bits;
  return warp.slots[meet(warp)];
}

template <typename T>
T unpack(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulator

inline thread_local Index threadIdx, blockIdx, gridDim;

inline void __syncthreads() { emulator::meet(emulator::block->all); }

inline unsigned __ballot_sync(unsigned mask, bool value) {
  const uint64_t* values = emulator::exchange(mask, value);
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= unsigned(values[lane] & 1) << lane;
  return bits;
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return emulator::unpack<T>(emulator::exchange(mask, value)[lane & 31]);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance) {
  const int lane = emulator::current % 32, source = lane + int(distance);
  const uint64_t* values = emulator::exchange(mask, value);
  return emulator::unpack<T>(values[source < 32 ? source : lane]);
}

inline void __nanosleep(unsigned) { sched_yield(); }
inline int __popc(unsigned mask) { return __builtin_popcount(mask); }
inline int __clz(unsigned mask) { return mask == 0 ? 32 : __builtin_clz(mask); }
inline int __ffs(unsigned mask) { return __builtin_ffs(int(mask)); }
inline unsigned atomicOr(unsigned* word, unsigned bits) {
  const unsigned before = *word;
  *word |= bits;
  return before;
}
using std::fma;
using std::memcpy;

namespace emulator {

inline void enter_fiber() {
  (*block->kernel)();
  block->fibers[current].done = true;
  yield();
}

// One block from beginning to end, with pauses at random so that blocks overlap in ever new ways.
inline void run_block(const std::function<void()>& kernel, int num_threads, unsigned seed) {
  Block own;
  own.fibers.resize(num_threads);
  own.warps.resize(num_threads / 32);
  own.all.size = num_threads;
  own.kernel = &kernel;
  own.random.seed(seed + 1);
  for (Meeting& warp : own.warps) warp.size = 32;
  constexpr size_t stack_bytes = 32 * 1024;
  for (Block::Fiber& fiber : own.fibers) {
    fiber.stack = std::make_unique_for_overwrite<char[]>(stack_bytes);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = stack_bytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter_fiber, 0);
  }
  block = &own;
  for (int left = num_threads; left > 0;) {
    if (own.random() % 4 == 0) sched_yield();
    for (current = 0; current < num_threads; ++current) {
      if (own.fibers[current].done) continue;
      threadIdx.x = current;
      resume(own.fibers[current]);
      left -= own.fibers[current].done;
    }
  }
}

// kernel<<<num_blocks, num_threads>>>(): at most `resident` blocks at a time. The first is late, so
// that the others have to wait for it.
inline void launch(int num_blocks, int num_threads, int resident, unsigned seed,
                   const std::function<void()>& kernel) {
  std::atomic<int> next = 0;
  std::vector<std::thread> workers;
  for (int i = 0; i < resident && i < num_blocks; ++i)
    workers.emplace_back([&] {
      for (int index; (index = next++) < num_blocks;) {
        blockIdx.x = unsigned(index);
        gridDim.x = unsigned(num_blocks);
        if (index == 0 && resident > 1)
          std::this_thread::sleep_for(std::chrono::milliseconds(resident));
        run_block(kernel, num_threads, seed * 1000003u + unsigned(index));
      }
    });
  for (std::thread& worker : workers) worker.join();
}

}  // namespace emulator
