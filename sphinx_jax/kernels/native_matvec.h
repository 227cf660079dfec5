// Matrix-vector products on a CPU: y[i] = x[i] @ w[index[i]], accumulated in float32; the stored weights are read once.
//
// XLA:CPU copies a matrix out of its stack before a product, or sums its rows in a loop of one thread.
// Here threads share tiles of some rows and columns: long pieces of rows, which the CPU fetches ahead. The tiles, and
// so the results, do not depend on the number of threads.

#ifndef SPHINX_JAX_NATIVE_MATVEC_H_
#define SPHINX_JAX_NATIVE_MATVEC_H_

#include <algorithm>
#include <cstdint>
#include <vector>

#include "native_common.h"
#include "native_integers.h"

namespace {

constexpr int64_t kTileBytes = 2048;  // Of a row.
constexpr int64_t kParts = 8;  // Of the rows, about: each has sums of its own, which are added up at the end.

struct Arguments {
  int64_t num_rows, width, num_outputs;  // Of a matrix: `width` stored values in a row.
  const void* values = nullptr;
  // Of quantized weights [matrix, number of groups, num_outputs]; steps and zeros of int4 alone.
  int64_t num_scales = 1, num_steps = 1;
  const BFloat16* scales = nullptr;
  const int8_t* steps = nullptr;
  const int8_t* zeros = nullptr;

  int64_t NumGroups() const { return std::max(num_scales, num_steps); }
  int64_t GroupRows() const { return num_rows / NumGroups(); }
};

// The rows of a part: whole groups, or whole blocks of the only group. So a part begins where a block does.
inline int64_t PartRows(const Arguments& a) {
  int64_t rows = (a.num_rows + kParts * kBlock - 1) / (kParts * kBlock) * kBlock, group = a.GroupRows();
  return a.NumGroups() == 1 ? rows : std::max<int64_t>(1, rows / group) * group;
}

// The inputs of a product: numbers, and for quantized weights as integers.
struct Inputs {
  const float* numbers;
  const Rounded* rounded;
};

// Rows and columns of a matrix.
struct Tile {
  int64_t matrix, first_row, rows, first_column, columns;
};

// y[columns of the tile] = x @ tile.
template <typename Kind>
void Multiply(const Arguments& a, const Inputs& x, const Tile& tile, float* y) {
  const auto* w = static_cast<const typename Kind::Stored*>(a.values) +
                  (tile.matrix * a.num_rows + tile.first_row) * a.width + tile.first_column;
  y += tile.first_column;
  std::fill(y, y + tile.columns, 0.0f);
  AddRows<Kind>(x.numbers + tile.first_row, w, tile.rows, a.width, tile.columns, y);
}

// sums[outputs of a value][column] = inputs times rows, which are in one group, from the integers of its blocks.
template <typename Kind>
void SumBlocks(const Rounded& x, int64_t first_row, int64_t rows, const typename Kind::Stored* w, int64_t width,
               int64_t columns, int32_t* integers, float* sums) {
  int64_t outputs = columns * Kind::kOutputs;
  std::fill(sums, sums + outputs, 0.0f);
  for (int64_t row = 0; row < rows; row += kBlock) {
    std::fill(integers, integers + outputs, 0);
    AddIntegers<Kind>(x.values.data() + first_row + row, w + row * width, std::min(kBlock, rows - row), width, columns,
                      integers);
    float scale = x.ScaleOf(first_row + row);
    for (int64_t i = 0; i < outputs; ++i) sums[i] += scale * static_cast<float>(integers[i]);
  }
}

// y += the sums of a group times the scales of its weights. `x_sum` is the sum of the group's inputs.
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

// The same as Multiply for quantized weights. A group with zeros is never divided: there are several.
template <typename Kind>
void MultiplyQuantized(const Arguments& a, const Inputs& x, const Tile& tile, float* y) {
  int64_t groups = a.NumGroups(), group_rows = a.GroupRows(), end = tile.first_row + tile.rows;
  int64_t first_output = tile.first_column * Kind::kOutputs, outputs = tile.columns * Kind::kOutputs;
  y += first_output;
  std::fill(y, y + outputs, 0.0f);
  static thread_local std::vector<int32_t> kept_integers;
  static thread_local std::vector<float> kept_sums;
  int32_t* integers = AtLeast(outputs, kept_integers);
  float* sums = AtLeast(outputs, kept_sums);
  for (int64_t row = tile.first_row; row < end;) {
    int64_t group = row / group_rows, rows = std::min(end, (group + 1) * group_rows) - row;
    const auto* w = static_cast<const typename Kind::Stored*>(a.values) +
                    (tile.matrix * a.num_rows + row) * a.width + tile.first_column;
    SumBlocks<Kind>(*x.rounded, row, rows, w, a.width, tile.columns, integers, sums);
    int64_t of_scales = (tile.matrix * a.num_scales + group * a.num_scales / groups) * a.num_outputs + first_output;
    int64_t of_steps = (tile.matrix * groups + group) * a.num_outputs + first_output;
    AddGroup<Kind>(sums, x.rounded->sums[group], a.scales + of_scales, a.steps ? a.steps + of_steps : nullptr,
                   a.zeros ? a.zeros + of_steps : nullptr, tile.columns, y);
    row += rows;
  }
}

ffi::Error Matvec(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer values, ffi::Buffer<ffi::S32> index,
                  ffi::RemainingArgs quantization, ffi::ResultBuffer<ffi::F32> y) {
  Arguments a{};
  a.num_rows = x.dimensions()[1], a.width = values.dimensions()[2], a.num_outputs = y->dimensions()[1];
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
  void (*multiply)(const Arguments&, const Inputs&, const Tile&, float*) = nullptr;
  switch (values.element_type()) {
    case ffi::F32: multiply = Multiply<Float32>; break;
    case ffi::BF16: multiply = Multiply<Bf16>; break;
    case ffi::S8: multiply = MultiplyQuantized<Int8>; break;
    case ffi::U8: multiply = MultiplyQuantized<Int4>; break;
    default: return ffi::Error::InvalidArgument("no weights of this type");
  }
  int64_t products = x.dimensions()[0], matrices = values.dimensions()[0];
  int64_t matrix_bytes = static_cast<int64_t>(values.size_bytes()) / matrices;
  // Rows of two tiles and less stay whole.
  int64_t row_bytes = matrix_bytes / a.num_rows, columns = a.width;
  if (row_bytes > 2 * kTileBytes) columns = kTileBytes * a.width / row_bytes;
  int64_t chunks = (a.width + columns - 1) / columns;
  int64_t part_rows = PartRows(a), parts = (a.num_rows + part_rows - 1) / part_rows;
  const float* inputs = x.typed_data();
  static thread_local std::vector<Rounded> kept_rounded;
  const Rounded* rounded = AtLeast(products, kept_rounded);
  for (int64_t i = 0; i < products && a.scales; ++i) {
    kept_rounded[i].Set(inputs + i * a.num_rows, a.num_rows, a.GroupRows());
  }
  static thread_local std::vector<float> partial_sums;
  float* outputs = parts > 1 ? AtLeast(products * parts * a.num_outputs, partial_sums) : y->typed_data();
  ForEach(pool, products * parts * chunks, NumThreads(pool, products * matrix_bytes),
          [=, chosen = index.typed_data()](int64_t i) {
            int64_t part = i / chunks, product = part / parts;
            int64_t first_row = part % parts * part_rows, first_column = i % chunks * columns;
            Tile tile{std::clamp<int64_t>(chosen[product], 0, matrices - 1), first_row,
                      std::min(part_rows, a.num_rows - first_row), first_column,
                      std::min(columns, a.width - first_column)};
            multiply(a, {inputs + product * a.num_rows, rounded + product}, tile, outputs + part * a.num_outputs);
          });
  for (int64_t product = 0; product < products && parts > 1; ++product) {
    const float* sums = outputs + product * parts * a.num_outputs;
    float* out = y->typed_data() + product * a.num_outputs;
    std::copy(sums, sums + a.num_outputs, out);
    for (int64_t part = 1; part < parts; ++part) {
      const float* more = sums + part * a.num_outputs;
      for (int64_t output = 0; output < a.num_outputs; ++output) out[output] += more[output];
    }
  }
  return ffi::Error::Success();
}

}  // namespace

#endif  // SPHINX_JAX_NATIVE_MATVEC_H_
