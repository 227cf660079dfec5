// Matrix-vector products on a CPU: y[i] = x[i] @ w[index[i]], accumulated in float32; the stored weights are read once.
//
// XLA:CPU copies a matrix out of its stack before a product, or sums its rows in a loop of one thread.
// Here threads share the columns. Each output is the sum over its rows in order, whatever the number of threads is.

#ifndef SPHINX_JAX_NATIVE_MATVEC_H_
#define SPHINX_JAX_NATIVE_MATVEC_H_

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "native_common.h"

namespace {

constexpr int64_t kChunksPerThread = 4;
constexpr int64_t kMinColumns = 64;  // A cache line of the smallest weights.

struct Arguments {
  int64_t num_rows, width, num_outputs;  // Of a matrix: `width` stored values in a row.
  const void* values;
  // Of quantized weights [matrix, number of groups, num_outputs]; steps and zeros of int4 alone.
  int64_t num_scales = 1, num_steps = 1;
  const BFloat16* scales = nullptr;
  const int8_t* steps = nullptr;
  const int8_t* zeros = nullptr;
};

// y += the sums of a group of rows, as numbers instead of integers. `x_sum` is the sum of the group's inputs.
template <typename Kind>
void AddGroup(const float* __restrict sums, float x_sum, const BFloat16* __restrict scales,
              const int8_t* __restrict steps, const int8_t* __restrict zeros, int64_t columns, float* __restrict y) {
  for (int64_t column = 0; column < columns; ++column) {
    for (int i = 0; i < Kind::kOutputs; ++i) {
      int64_t output = column * Kind::kOutputs + i;
      float sum = sums[i * columns + column], scale = ToFloat(scales[output]);
      if constexpr (Kind::kHasSteps) {
        // A weight is scale x step x (16 x value - zero).
        sum = 16 * sum - x_sum * zeros[output];
        scale *= steps[output];
      }
      y[output] += sum * scale;
    }
  }
}

// y[outputs of the columns from `first` on] = x @ matrix.
template <typename Kind>
void Columns(const Arguments& a, const float* x, int64_t matrix, int64_t first, int64_t columns, float* y) {
  const auto* w = static_cast<const typename Kind::Stored*>(a.values) + matrix * a.num_rows * a.width + first;
  int64_t first_output = first * Kind::kOutputs;
  y += first_output;
  std::fill(y, y + columns * Kind::kOutputs, 0.0f);
  if constexpr (!Kind::kQuantized) {
    AddRows<Kind>(x, w, a.num_rows, a.width, columns, y);
  } else {
    std::vector<float> sums(columns * Kind::kOutputs);
    int64_t groups = std::max(a.num_scales, a.num_steps), rows = a.num_rows / groups;
    for (int64_t group = 0; group < groups; ++group, x += rows, w += rows * a.width) {
      std::fill(sums.begin(), sums.end(), 0.0f);
      AddRows<Kind>(x, w, rows, a.width, columns, sums.data());
      int64_t of_scales = (matrix * a.num_scales + group * a.num_scales / groups) * a.num_outputs + first_output;
      int64_t of_steps = (matrix * groups + group) * a.num_outputs + first_output;
      AddGroup<Kind>(sums.data(), std::accumulate(x, x + rows, 0.0f), a.scales + of_scales,
                     a.steps ? a.steps + of_steps : nullptr, a.zeros ? a.zeros + of_steps : nullptr, columns, y);
    }
  }
}

ffi::Error Matvec(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer values, ffi::Buffer<ffi::S32> index,
                  ffi::RemainingArgs quantization, ffi::ResultBuffer<ffi::F32> y) {
  Arguments a{.num_rows = x.dimensions()[1], .width = values.dimensions()[2], .num_outputs = y->dimensions()[1]};
  a.values = values.untyped_data();
  if (quantization.size() > 0) {
    auto scales = quantization.get<ffi::Buffer<ffi::BF16>>(0);
    if (!scales) return scales.error();
    a.scales = reinterpret_cast<const BFloat16*>(scales->typed_data());
    a.num_scales = scales->dimensions()[1];
  }
  if (quantization.size() > 1) {
    auto steps = quantization.get<ffi::Buffer<ffi::S8>>(1);
    auto zeros = quantization.get<ffi::Buffer<ffi::S8>>(2);
    if (!steps) return steps.error();
    if (!zeros) return zeros.error();
    a.steps = steps->typed_data();
    a.zeros = zeros->typed_data();
    a.num_steps = steps->dimensions()[1];
  }
  void (*columns_of)(const Arguments&, const float*, int64_t, int64_t, int64_t, float*) = nullptr;
  switch (values.element_type()) {
    case ffi::F32: columns_of = Columns<Float32>; break;
    case ffi::BF16: columns_of = Columns<Bf16>; break;
    case ffi::S8: columns_of = Columns<Int8>; break;
    case ffi::U8: columns_of = Columns<Int4>; break;
    default: return ffi::Error::InvalidArgument("no weights of this type");
  }
  int64_t products = x.dimensions()[0], last = values.dimensions()[0] - 1;
  int64_t bytes = products * static_cast<int64_t>(values.size_bytes()) / values.dimensions()[0];
  int64_t num_threads = NumThreads(pool, bytes);
  int64_t size = a.width * products / (num_threads * kChunksPerThread) / kMinColumns * kMinColumns;
  size = std::clamp<int64_t>(size, std::min<int64_t>(kMinColumns, a.width), a.width);
  int64_t chunks = (a.width + size - 1) / size;
  const float* inputs = x.typed_data();
  const int32_t* matrices = index.typed_data();
  float* outputs = y->typed_data();
  ForEach(pool, products * chunks, num_threads, [=](int64_t i) {
    int64_t product = i / chunks, first = i % chunks * size;
    int64_t matrix = std::clamp<int64_t>(matrices[product], 0, last);
    columns_of(a, inputs + product * a.num_rows, matrix, first, std::min(size, a.width - first),
               outputs + product * a.num_outputs);
  });
  return ffi::Error::Success();
}

}  // namespace

#endif  // SPHINX_JAX_NATIVE_MATVEC_H_
