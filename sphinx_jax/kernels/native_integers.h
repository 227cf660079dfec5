// Products of quantized weights in integers: inputs are rounded to 16 bits, products summed exactly in 32.
//
// An input is rounded by at most 1 / 65,534 of the largest of its block, where int8 rounds a weight by up to 1 / 254 of
// the largest of its output. Half of the instructions of a product in floats remain.

#ifndef SPHINX_JAX_NATIVE_INTEGERS_H_
#define SPHINX_JAX_NATIVE_INTEGERS_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kBlock = 256;  // Inputs with a scale of their own. So many products of 16 and 8 bits fit in 32.
constexpr int64_t kPairs = 4;  // Of rows, added to a sum between its load and its store.

// How weights are stored, how many outputs a stored value holds, and output `i` of a value.

struct Int8 {
  using Stored = int8_t;
  static constexpr bool kHasSteps = false;
  static constexpr int kOutputs = 1;
  static int32_t Output(Stored w, int) { return w; }
#ifdef __AVX2__
  static __m128i Outputs(__m128i w, int) { return w; }
#endif
};

// The first output is in the low four bits, both are in two's complement.
struct Int4 {
  using Stored = int8_t;
  static constexpr bool kHasSteps = true;
  static constexpr int kOutputs = 2;
  static int32_t Output(Stored w, int i) {
    return i ? w >> 4 : static_cast<int32_t>(static_cast<uint32_t>(w) << 28) >> 28;
  }
#ifdef __AVX2__
  static __m128i Outputs(__m128i w, int i) {
    const __m128i sign = _mm_set1_epi8(8);
    __m128i bits = _mm_and_si128(i ? _mm_srli_epi16(w, 4) : w, _mm_set1_epi8(15));
    return _mm_sub_epi8(_mm_xor_si128(bits, sign), sign);
  }
#endif
};

inline int16_t ToInt16(float x) { return static_cast<int16_t>(std::lrint(std::clamp(x, -32767.0f, 32767.0f))); }

// Inputs as scale x integer, in blocks within each group of `group_size`.
struct Rounded {
  std::vector<int16_t> values;
  std::vector<float> scales;  // Of each block of each group.
  std::vector<float> sums;  // Of the rounded inputs of each group.

  int64_t group_size = 1;

  void Set(const float* x, int64_t length, int64_t size) {
    group_size = size;
    values.resize(length);
    scales.clear();
    sums.clear();
    for (int64_t group = 0; group < length; group += group_size) {
      sums.push_back(0.0f);
      for (int64_t first = group; first < group + group_size; first += kBlock) {
        int64_t end = std::min(first + kBlock, group + group_size);
        float largest = 0.0f, not_finite = 0.0f;
        for (int64_t i = first; i < end; ++i) {
          largest = std::max(largest, std::fabs(x[i]));
          not_finite += x[i] * 0.0f;
        }
        // Infinity and NaN make all outputs NaN.
        float scale = largest / 32767.0f + not_finite;
        float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
        int32_t sum = 0;
        for (int64_t i = first; i < end; ++i) sum += values[i] = ToInt16(x[i] * inverse);
        scales.push_back(scale);
        sums.back() += scale * static_cast<float>(sum);
      }
    }
  }

  // Of the block that begins at an input.
  float ScaleOf(int64_t first) const {
    int64_t blocks = (group_size + kBlock - 1) / kBlock;
    return scales[first / group_size * blocks + first % group_size / kBlock];
  }
};

// sums[column] += sum over 2 x `pairs` rows of x[row] times output `i` of w[row][column].
template <typename Kind, int64_t pairs>
void AddPairs(const int16_t* x, const typename Kind::Stored* w, int64_t width, int64_t columns, int i,
              int32_t* __restrict sums) {
  int64_t column = 0;
#ifdef __AVX2__
  __m256i inputs[pairs];
  for (int64_t pair = 0; pair < pairs; ++pair) {
    int32_t both;
    std::memcpy(&both, x + 2 * pair, sizeof both);
    inputs[pair] = _mm256_set1_epi32(both);
  }
  for (; column + 16 <= columns; column += 16) {
    // The same line of the rows that follow, two in each of four steps; one past the end is fetched without effect.
    const auto* next = w + (2 * pairs + column / 8 % 8) * width + column;
    __builtin_prefetch(next);
    __builtin_prefetch(next + width);
    auto* sum = reinterpret_cast<__m256i*>(sums + column);
    __m256i low = _mm256_loadu_si256(sum), high = _mm256_loadu_si256(sum + 1);
#pragma GCC unroll 4
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const auto* first = w + 2 * pair * width + column;
      __m128i a = Kind::Outputs(_mm_loadu_si128(reinterpret_cast<const __m128i*>(first)), i);
      __m128i b = Kind::Outputs(_mm_loadu_si128(reinterpret_cast<const __m128i*>(first + width)), i);
      // The two rows of a column next to each other: one instruction multiplies both and adds them.
      __m256i of_low = _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(a, b));
      __m256i of_high = _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(a, b));
      low = _mm256_add_epi32(low, _mm256_madd_epi16(of_low, inputs[pair]));
      high = _mm256_add_epi32(high, _mm256_madd_epi16(of_high, inputs[pair]));
    }
    _mm256_storeu_si256(sum, low);
    _mm256_storeu_si256(sum + 1, high);
  }
#endif
  for (; column < columns; ++column) {
    int32_t sum = sums[column];
    for (int64_t row = 0; row < 2 * pairs; ++row) sum += x[row] * Kind::Output(w[row * width + column], i);
    sums[column] = sum;
  }
}

// The same for any number of rows, and all outputs of a value. sums[kOutputs][columns].
template <typename Kind>
void AddIntegers(const int16_t* x, const typename Kind::Stored* w, int64_t rows, int64_t width, int64_t columns,
                 int32_t* sums) {
  for (int i = 0; i < Kind::kOutputs; ++i, sums += columns) {
    int64_t row = 0;
    for (; row + 2 * kPairs <= rows; row += 2 * kPairs) {
      AddPairs<Kind, kPairs>(x + row, w + row * width, width, columns, i, sums);
    }
    for (; row + 2 <= rows; row += 2) AddPairs<Kind, 1>(x + row, w + row * width, width, columns, i, sums);
    if (row < rows) {
      for (int64_t column = 0; column < columns; ++column) {
        sums[column] += x[row] * Kind::Output(w[row * width + column], i);
      }
    }
  }
}

}  // namespace

#endif  // SPHINX_JAX_NATIVE_INTEGERS_H_
