// Attention of one query for each sequence on a CPU, accumulated in float32; the KV cache is read in place.
//
// XLA:CPU multiplies each query by the keys of all heads, to the end of the cache, with one thread.
// Here threads share parts of the sequences, and read what is filled, each part once and in order. The parts, and so
// the results, do not depend on the number of threads.

#ifndef SPHINX_JAX_NATIVE_ATTENTION_H_
#define SPHINX_JAX_NATIVE_ATTENTION_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "native_common.h"

namespace {

constexpr int64_t kLanes = 8;  // Partial results of a reduction.
constexpr int64_t kPositions = 128;  // Of a part of a sequence: threads share the parts.

typedef float Lanes __attribute__((vector_size(4 * kLanes)));

inline Lanes Load(const float* x) {
  Lanes lanes;
  std::memcpy(&lanes, x, sizeof lanes);
  return lanes;
}

inline Lanes Load(const BFloat16* x) {
  typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
  typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
  Halves halves;
  std::memcpy(&halves, x, sizeof halves);
  Bits bits = __builtin_convertvector(halves, Bits) << 16;
  Lanes lanes;
  std::memcpy(&lanes, &bits, sizeof lanes);
  return lanes;
}

// x . y: in vectors, as the compiler reorders no sum by itself. Two of them hide the latency of an addition.
template <typename Kind>
inline float Dot(const float* x, const typename Kind::Stored* y, int64_t length) {
  Lanes sums{}, more{};
  int64_t i = 0;
  for (; i + 2 * kLanes <= length; i += 2 * kLanes) {
    sums += Load(x + i) * Load(y + i);
    more += Load(x + i + kLanes) * Load(y + i + kLanes);
  }
  if (i + kLanes <= length) {
    sums += Load(x + i) * Load(y + i);
    i += kLanes;
  }
  sums += more;
  // By halves, with constant indices: the sums stay in registers.
  typedef float Half __attribute__((vector_size(2 * kLanes)));
  Half halves[2];
  std::memcpy(halves, &sums, sizeof sums);
  halves[0] += halves[1];
  float sum = (halves[0][0] + halves[0][2]) + (halves[0][1] + halves[0][3]);
  for (; i < length; ++i) sum += x[i] * Kind::Number(y[i]);
  return sum;
}

// The fold of x[i] for each i below `count`, in partial results of which the compiler makes vectors.
template <typename Fold>
inline float Reduce(const float* x, int64_t count, float start, Fold fold) {
  float lanes[kLanes];
  std::fill(lanes, lanes + kLanes, start);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = fold(lanes[lane], x[i + lane]);
  }
  float result = start;
  for (float lane : lanes) result = fold(result, lane);
  for (; i < count; ++i) result = fold(result, x[i]);
  return result;
}

inline float Add(float a, float b) { return a + b; }
inline float Max(float a, float b) { return a < b ? b : a; }

// e^x of an x <= 0, without branches: 2^n times a polynomial in x - n ln 2 (Cephes, expf). std::exp is a call a number.
inline float Exp(float x) {
  x = Max(x, -87.0f);  // The smallest normal number follows.
  constexpr float kRound = 12582912.0f;  // 1.5 x 2^23: to add it rounds to an integer, in the low bits.
  float shifted = x * 1.44269504f + kRound, n = shifted - kRound;
  float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  // The integer in the low bits goes to the exponent; the others are shifted out.
  bits = static_cast<int32_t>((static_cast<uint32_t>(bits) << 23) + 0x3f800000u);
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

struct Shape {
  int64_t kv_heads, group, dim;
  int64_t Heads() const { return kv_heads * group; }
  int64_t Stride() const { return kv_heads * dim; }  // From one position to the next.
  // Of the softmax over some positions: the largest score and the sum of the exponentials of each query head, and the
  // sums of values, not yet divided.
  int64_t PartialSize() const { return Heads() * (dim + 2); }
};

// The softmax over `positions` positions for all heads of a sequence; k and v [position, head, channel] are streamed.
template <typename Kind>
void Attend(const Shape& shape, const float* q, const typename Kind::Stored* k, const typename Kind::Stored* v,
            int64_t positions, float* partial) {
  int64_t heads = shape.Heads(), dim = shape.dim, stride = shape.Stride();
  float scale = 1.0f / std::sqrt(static_cast<float>(dim));
  static thread_local std::vector<float> kept;
  float* weights = AtLeast(heads * positions, kept);
  for (int64_t position = 0; position < positions; ++position) {
    for (int64_t head = 0; head < heads; ++head) {
      const float* query = q + head * dim;
      const auto* key = k + position * stride + head / shape.group * dim;
      weights[head * positions + position] = scale * Dot<Kind>(query, key, dim);
    }
  }
  float *largest = partial, *total = partial + heads, *sums = partial + 2 * heads;
  for (int64_t head = 0; head < heads; ++head) {
    float* row = weights + head * positions;
    float top = Reduce(row, positions, -std::numeric_limits<float>::infinity(), Max);
    for (int64_t i = 0; i < positions; ++i) row[i] = Exp(row[i] - top);
    largest[head] = top;
    total[head] = Reduce(row, positions, 0.0f, Add);
  }
  std::fill(sums, sums + heads * dim, 0.0f);
  for (int64_t first = 0; first < positions; first += kRows) {
    int64_t rows = std::min(kRows, positions - first);
    for (int64_t head = 0; head < heads; ++head) {
      AddRows<Kind>(weights + head * positions + first, v + first * stride + head / shape.group * dim, rows,
                    stride, dim, sums + head * dim);
    }
  }
}

// out[head, channel] of a sequence from the partial results of all its positions.
inline void Merge(const Shape& shape, const float* partials, int64_t count, float* out) {
  int64_t heads = shape.Heads(), dim = shape.dim, size = shape.PartialSize();
  std::fill(out, out + heads * dim, 0.0f);
  for (int64_t head = 0; head < heads; ++head) {
    float largest = partials[head], total = 0.0f;
    for (int64_t i = 1; i < count; ++i) largest = Max(largest, partials[i * size + head]);
    for (int64_t i = 0; i < count; ++i) {
      total += Exp(partials[i * size + head] - largest) * partials[i * size + heads + head];
    }
    for (int64_t i = 0; i < count; ++i) {
      float weight = Exp(partials[i * size + head] - largest) / total;
      const float* sums = partials + i * size + 2 * heads + head * dim;
      for (int64_t channel = 0; channel < dim; ++channel) out[head * dim + channel] += weight * sums[channel];
    }
  }
}

template <typename Kind>
void AttendAll(ffi::ThreadPool& pool, ffi::Buffer<ffi::F32> q, ffi::AnyBuffer k, ffi::AnyBuffer v,
               ffi::Buffer<ffi::S32> lengths, float* out) {
  using Stored = typename Kind::Stored;
  struct Part {
    int64_t sequence, first, positions;
  };
  int64_t batch = k.dimensions()[0], cache_len = k.dimensions()[1];
  Shape shape{.kv_heads = q.dimensions()[1], .group = q.dimensions()[2], .dim = q.dimensions()[3]};
  std::vector<Part> parts;
  std::vector<int64_t> first_part(batch + 1, 0);
  int64_t bytes = 0;
  for (int64_t i = 0; i < batch; ++i) {
    int64_t length = std::clamp<int64_t>(lengths.typed_data()[i], 1, cache_len);
    for (int64_t first = 0; first < length; first += kPositions) {
      parts.push_back({i, first, std::min(kPositions, length - first)});
    }
    first_part[i + 1] = static_cast<int64_t>(parts.size());
    bytes += 2 * length * shape.Stride() * static_cast<int64_t>(sizeof(Stored));
  }
  static thread_local std::vector<float> kept;
  float* partials = AtLeast(static_cast<int64_t>(parts.size()) * shape.PartialSize(), kept);
  const float* queries = q.typed_data();
  const auto* keys = static_cast<const Stored*>(k.untyped_data());
  const auto* values = static_cast<const Stored*>(v.untyped_data());
  int64_t size = shape.Heads() * shape.dim;
  // A thread that comes too late copies these pointers, and does not use them.
  ForEach(pool, static_cast<int64_t>(parts.size()), NumThreads(pool, bytes),
          [=, part = parts.data()](int64_t i) {
            int64_t offset = (part[i].sequence * cache_len + part[i].first) * shape.Stride();
            Attend<Kind>(shape, queries + part[i].sequence * size, keys + offset, values + offset, part[i].positions,
                         partials + i * shape.PartialSize());
          });
  for (int64_t i = 0; i < batch; ++i) {
    Merge(shape, partials + first_part[i] * shape.PartialSize(), first_part[i + 1] - first_part[i],
          out + i * size);
  }
}

// q and out [sequence, key/value head, query of its group, channel], k and v [sequence, position, head, channel].
ffi::Error DecodeAttention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                           ffi::Buffer<ffi::S32> lengths, ffi::ResultBuffer<ffi::F32> out) {
  switch (k.element_type()) {
    case ffi::F32: AttendAll<Float32>(pool, q, k, v, lengths, out->typed_data()); break;
    case ffi::BF16: AttendAll<Bf16>(pool, q, k, v, lengths, out->typed_data()); break;
    default: return ffi::Error::InvalidArgument("no keys of this type");
  }
  return ffi::Error::Success();
}

}  // namespace

#endif  // SPHINX_JAX_NATIVE_ATTENTION_H_
