// What the kernels for one CPU share: stored weights as numbers, weighted sums of rows, and threads.

#ifndef SPHINX_JAX_NATIVE_COMMON_H_
#define SPHINX_JAX_NATIVE_COMMON_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kRows = 8;  // Rows added to a sum between its load and its store.
constexpr int64_t kBytesPerThread = 1 << 16;  // Those of the pool spin between two calls, and come in time.

struct BFloat16 {
  uint16_t bits;
};

inline float ToFloat(BFloat16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Each kind of weights: how they are stored, and a stored value as a number.

struct Float32 {
  using Stored = float;
  static float Number(Stored w) { return w; }
};

struct Bf16 {
  using Stored = BFloat16;
  static float Number(Stored w) { return ToFloat(w); }
};

// sums[column] += sum over rows of x[row] times w[row][column]. Rows of `w` are `width` values apart.
//
// The compiler makes vectors of the columns: no sum is reordered.
template <typename Kind, int64_t rows>
void AddRows(const float* x, const typename Kind::Stored* __restrict w, int64_t width, int64_t columns,
             float* __restrict sums) {
  for (int64_t column = 0; column < columns; ++column) {
    float sum = sums[column];
#pragma GCC unroll 8
    for (int64_t row = 0; row < rows; ++row) sum += x[row] * Kind::Number(w[row * width + column]);
    sums[column] = sum;
  }
}

// The same for any number of rows.
template <typename Kind>
void AddRows(const float* x, const typename Kind::Stored* w, int64_t rows, int64_t width, int64_t columns,
             float* sums) {
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) AddRows<Kind, kRows>(x + row, w + row * width, width, columns, sums);
  for (; row < rows; ++row) AddRows<Kind, 1>(x + row, w + row * width, width, columns, sums);
}

// At least `count` numbers, to be kept in a thread_local vector: the values are those of the last use.
//
// malloc takes up to 30 us for a block of some KiB, once its lists hold what was freed while the weights were read.
template <typename T>
T* AtLeast(int64_t count, std::vector<T>& kept) {
  if (static_cast<int64_t>(kept.size()) < count) kept.resize(count);
  return kept.data();
}

// The number of threads that are worth waking to read so many bytes.
inline int64_t NumThreads(const ffi::ThreadPool& pool, int64_t bytes) {
  return std::clamp<int64_t>(bytes / kBytesPerThread, 1, std::max<int64_t>(pool.num_threads(), 1));
}

// Calls work(0), ..., work(count - 1) in this thread and in those of the pool that come in time.
//
// A thread of the pool that starts late finds nothing left: this call only waits for work that has been begun, so
// programs that run at the same time and share the pool do not wait for each other.
template <typename Work>
void ForEach(ffi::ThreadPool& pool, int64_t count, int64_t num_threads, Work work) {
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto shared = std::make_shared<Shared>();
  auto run = [shared, count, work] {
    for (int64_t i; (i = shared->next.fetch_add(1)) < count;) {
      work(i);
      shared->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t i = 1; i < std::min(num_threads, count); ++i) {
    auto task = run;
    pool.Schedule(std::move(task));
  }
  run();
  while (shared->done.load(std::memory_order_acquire) < count) std::this_thread::yield();
}

}  // namespace

#endif  // SPHINX_JAX_NATIVE_COMMON_H_
