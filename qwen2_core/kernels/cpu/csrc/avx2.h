// Sums bfloat16 products with AVX2 and FMA, which nearly all x86 CPUs have: weights are widened to float32 as they are
// read. Panels hold float32, 16 outputs of each input beside each other. Sums run over the inputs one by one, with a
// single row too, but for a single row times w [outputs, inputs].

#pragma once

#include <immintrin.h>

#include <cstring>
#include <limits>

#include "product.h"

#define AVX2 __attribute__((target("avx2,fma")))

namespace avx2 {
namespace {

constexpr int kMostRows = 6;                // at once: registers for 12 sums, 2 vectors of weights, 1 of x
constexpr int64_t kHalf = kWidth / 2;       // outputs at once
constexpr int kAlong = 16;                  // inputs at once, where a few rows are multiplied by weights as they lie
constexpr int64_t kMostAlong = 16;          // such rows, at most
constexpr int64_t kManyInputs = 256;        // of a panel: 8 stripes of them stay in the second-level cache
constexpr int64_t kWideStride = 1024 + 16;  // floats; a power of two would map all rows to one place of the cache

// Bfloat16 values are the upper halves of float32 values.
AVX2 inline float Widen1(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}
AVX2 inline __m256 Widen8(const uint16_t* values) {
  const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
}

// Of sixteen values those at even, or at odd places.
AVX2 inline __m256i LoadPairs(const uint16_t* values) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
}
AVX2 inline __m256 WidenEven(const uint16_t* values) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(LoadPairs(values), 16));
}
AVX2 inline __m256 WidenOdd(const uint16_t* values) {
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000));
  return _mm256_castsi256_ps(_mm256_and_si256(LoadPairs(values), upper));
}

// Rounds to the nearest bfloat16, halves to even. NaN stays NaN.
AVX2 inline __m128i Round8(__m256 values) {
  const __m256i bits = _mm256_castps_si256(values), upper = _mm256_srli_epi32(bits, 16);
  const __m256i half = _mm256_add_epi32(_mm256_set1_epi32(0x7fff), _mm256_and_si256(upper, _mm256_set1_epi32(1)));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
  const __m256i quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
  const __m256i either = _mm256_blendv_epi8(rounded, quiet, is_nan);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(either, either), 0x08));
}
AVX2 inline void Store8(uint16_t* out, __m128i values, int64_t count) {
  if (count >= 8) return _mm_storeu_si128(reinterpret_cast<__m128i*>(out), values);
  alignas(16) uint16_t all[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(all), values);
  std::memcpy(out, all, count * sizeof(uint16_t));
}

// A mask of the first n of 8 lanes.
AVX2 inline __m256i Lanes8(int64_t n) {
  alignas(32) static constexpr int32_t kLanes[8] = {0, 1, 2, 3, 4, 5, 6, 7};
  const __m256i count = _mm256_set1_epi32(static_cast<int32_t>(std::min<int64_t>(n, 8)));
  return _mm256_cmpgt_epi32(count, _mm256_load_si256(reinterpret_cast<const __m256i*>(kLanes)));
}
// ((0 + 4) + (1 + 5)) + ((2 + 6) + (3 + 7)) of the lanes of each.
AVX2 inline __m128 SumsOf(__m256 a, __m256 b, __m256 c, __m256 d) {
  const auto halves = [](__m256 v) AVX2 { return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)); };
  return _mm_hadd_ps(_mm_hadd_ps(halves(a), halves(b)), _mm_hadd_ps(halves(c), halves(d)));
}
AVX2 inline float SumOf(__m256 values) { return _mm_cvtss_f32(SumsOf(values, values, values, values)); }

int64_t PanelLines(int64_t depth) { return 2 * depth + 2; }

// Whether rows of w [outputs, inputs] are multiplied as they lie. It is decided by the inputs alone, so that sums have
// one order for any number of rows; of short rows, such as keys, the sums of eight lanes would take too long.
inline bool UsesDots(const Product& p) { return p.transposed && p.inputs >= 256; }

// Writes x[:, k .. k + depth] in float32, rows kWideStride apart. For dots the even ones of 16 inputs come first.
AVX2 inline void WidenRows(const Product& p, int64_t k, int64_t depth, int64_t rows, float* wide) {
  for (int64_t r = 0; r < rows; ++r) {
    const uint16_t* x = p.x + r * p.x_stride + k;
    float* out = wide + r * kWideStride;
    int64_t i = 0;
    for (; i + 16 <= depth; i += 16) {
      if (UsesDots(p)) {
        _mm256_storeu_ps(out + i, WidenEven(x + i));
        _mm256_storeu_ps(out + i + 8, WidenOdd(x + i));
      } else {
        _mm256_storeu_ps(out + i, Widen8(x + i));
        _mm256_storeu_ps(out + i + 8, Widen8(x + i + 8));
      }
    }
    for (; i < depth; ++i) out[i] = Widen1(x[i]);
  }
}

// Packs 16 columns of w [outputs, inputs]: panel[i][n] = w[first + n, k + i]. Transposes squares of 8.
AVX2 inline void PackHalf(const Product& p, int64_t k, int64_t depth, int64_t first, float* panel) {
  for (int64_t group = 0; group < kHalf; group += 8) {
    const int64_t outputs = std::clamp<int64_t>(p.outputs - first - group, 0, 8);
    const uint16_t* w = p.w + (first + group) * p.inputs + k;
    for (int64_t i = 0; i < depth; i += 8) {
      float* to = panel + i * kHalf + group;
      if (outputs < 8 || i + 8 > depth) {
        for (int64_t j = 0; j < std::min<int64_t>(8, depth - i); ++j) {
          for (int64_t n = 0; n < 8; ++n) to[j * kHalf + n] = n < outputs ? Widen1(w[n * p.inputs + i + j]) : 0;
        }
        continue;
      }
      __m256 a[8], b[8];
#pragma GCC unroll 8
      for (int n = 0; n < 8; ++n) {
        if (i % 32 == 0) {  // the next stripe
          _mm_prefetch(reinterpret_cast<const char*>(w + (kWidth + n) * p.inputs + i), _MM_HINT_T1);
        }
        a[n] = Widen8(w + n * p.inputs + i);
      }
#pragma GCC unroll 4
      for (int n = 0; n < 8; n += 2) {
        b[n] = _mm256_unpacklo_ps(a[n], a[n + 1]);
        b[n + 1] = _mm256_unpackhi_ps(a[n], a[n + 1]);
      }
#pragma GCC unroll 2
      for (int n = 0; n < 8; n += 4) {
        a[n] = _mm256_shuffle_ps(b[n], b[n + 2], 0x44);
        a[n + 1] = _mm256_shuffle_ps(b[n], b[n + 2], 0xee);
        a[n + 2] = _mm256_shuffle_ps(b[n + 1], b[n + 3], 0x44);
        a[n + 3] = _mm256_shuffle_ps(b[n + 1], b[n + 3], 0xee);
      }
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        _mm256_storeu_ps(to + j * kHalf, _mm256_permute2f128_ps(a[j], a[j + 4], 0x20));
        _mm256_storeu_ps(to + (j + 4) * kHalf, _mm256_permute2f128_ps(a[j], a[j + 4], 0x31));
      }
    }
  }
}

AVX2 inline void PackColumns(const Product& p, int64_t k, int64_t depth, int64_t first, Line* panel) {
  for (int64_t half = 0; half < 2; ++half) {
    PackHalf(p, k, depth, first + half * kHalf, reinterpret_cast<float*>(panel + half * depth));
  }
}

// Packs a stripe of w [inputs, outputs]: panel[half][i][n] = w[k + i, first + 16 half + n]. Reads whole lines.
AVX2 inline void PackStripe(const Product& p, int64_t k, int64_t depth, int64_t first, Line* lines) {
  const int64_t outputs = p.outputs - first;
  const uint16_t* w = p.w + k * p.outputs + first;
  float *low = reinterpret_cast<float*>(lines), *high = reinterpret_cast<float*>(lines + depth);
  Ahead ahead = p.ahead;
  const int64_t each = ahead.each(depth);
  for (int64_t i = 0; i < depth; ++i, w += p.outputs, low += kHalf, high += kHalf) {
    ahead.Prefetch(each);
    if (outputs < kWidth) {
      for (int64_t n = 0; n < kWidth; ++n) (n < kHalf ? low : high - kHalf)[n] = n < outputs ? Widen1(w[n]) : 0;
      continue;
    }
    _mm256_store_ps(low, Widen8(w));
    _mm256_store_ps(low + 8, Widen8(w + 8));
    _mm256_store_ps(high, Widen8(w + 16));
    _mm256_store_ps(high + 8, Widen8(w + 24));
  }
}

AVX2 inline void Pack(const Product& p, int64_t k, int64_t depth, int64_t first, Line* panel) {
  p.transposed ? PackColumns(p, k, depth, first, panel) : PackStripe(p, k, depth, first, panel);
}

// Adds kRows rows of p.wide times 16 outputs of a panel to the sums at `out`.
template <int kRows>
AVX2 inline void Sum(const Product& p, Ahead ahead, int64_t depth, bool add, const float* panel, float* out,
                     int64_t out_stride) {
  __m256 sums[kRows][2];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    sums[r][0] = add ? _mm256_loadu_ps(out + r * out_stride) : _mm256_setzero_ps();
    sums[r][1] = add ? _mm256_loadu_ps(out + r * out_stride + 8) : _mm256_setzero_ps();
  }
  const float* x = p.wide;
  const int64_t each = ahead.each(depth);
  for (int64_t i = 0; i < depth; ++i) {
    ahead.Prefetch(each);
    const __m256 w0 = _mm256_load_ps(panel + i * kHalf), w1 = _mm256_load_ps(panel + i * kHalf + 8);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const __m256 one = _mm256_broadcast_ss(x + r * kWideStride + i);
      sums[r][0] = _mm256_fmadd_ps(one, w0, sums[r][0]);
      sums[r][1] = _mm256_fmadd_ps(one, w1, sums[r][1]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    _mm256_storeu_ps(out + r * out_stride, sums[r][0]);
    _mm256_storeu_ps(out + r * out_stride + 8, sums[r][1]);
  }
}

template <int kRows>
AVX2 void Multiply(const Product& p, int64_t k, int64_t depth, int64_t first, Line* lines) {
  const bool add = k || p.add;
  for (int64_t half = 0; half < 2; ++half) {
    const int64_t begin = first + half * kHalf, outputs = std::min(p.outputs - begin, kHalf);
    if (outputs <= 0) return;
    float* out = p.sums(begin);
    const float* panel = reinterpret_cast<const float*>(lines + half * depth);
    const Ahead ahead = half ? Ahead() : p.ahead;
    if (outputs == kHalf) {
      Sum<kRows>(p, ahead, depth, add, panel, out, p.out_stride);
      continue;
    }
    alignas(32) float part[kRows * kHalf] = {};
    for (int64_t r = 0; add && r < kRows; ++r) std::copy_n(out + r * p.out_stride, outputs, part + r * kHalf);
    Sum<kRows>(p, ahead, depth, add, panel, part, kHalf);
    for (int64_t r = 0; r < kRows; ++r) std::copy_n(part + r * kHalf, outputs, out + r * p.out_stride);
  }
}

template <int... kRows>
constexpr std::array<MultiplyRows, kMostRows> Table(std::integer_sequence<int, kRows...>) {
  return {Multiply<kRows + 1>...};
}
constexpr auto kMultiply = Table(std::make_integer_sequence<int, kMostRows>());

// Adds kRows rows of p.wide times kOutputs rows of w [outputs, inputs], from input k on, to the sums at `output`. Needs
// no panel, whose making takes longer than the products of a few rows.
template <int kRows, int kOutputs>
AVX2 inline void Dot(const Product& p, int64_t k, int64_t depth, int64_t output) {
  __m256 sums[kRows][kOutputs] = {};
  const uint16_t* w = p.w + output * p.inputs + k;
  const float* x = p.wide;
  for (int64_t i = 0; i + 16 <= depth; i += 16) {
    __m256 weights[kOutputs];
#pragma GCC unroll 3
    for (int n = 0; n < kOutputs; ++n) {
      const uint16_t* at = w + n * p.inputs + i;
      if (i % 32 == 0) {  // the next stripe
        _mm_prefetch(reinterpret_cast<const char*>(at + kWidth * p.inputs), _MM_HINT_T1);
      }
      weights[n] = WidenEven(at);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const __m256 even = _mm256_loadu_ps(x + r * kWideStride + i);
#pragma GCC unroll 3
      for (int n = 0; n < kOutputs; ++n) sums[r][n] = _mm256_fmadd_ps(even, weights[n], sums[r][n]);
    }
#pragma GCC unroll 3
    for (int n = 0; n < kOutputs; ++n) weights[n] = WidenOdd(w + n * p.inputs + i);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const __m256 uneven = _mm256_loadu_ps(x + r * kWideStride + i + 8);
#pragma GCC unroll 3
      for (int n = 0; n < kOutputs; ++n) sums[r][n] = _mm256_fmadd_ps(uneven, weights[n], sums[r][n]);
    }
  }
  const bool add = k || p.add;
  float* out = p.sums(output);
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r, out += p.out_stride, x += kWideStride) {
    alignas(16) float all[4];  // of one or three outputs
    _mm_store_ps(all, SumsOf(sums[r][0], sums[r][kOutputs / 2], sums[r][kOutputs - 1], sums[r][0]));
    for (int n = 0; n < kOutputs; ++n) {
      float sum = all[n];
      for (int64_t i = depth / 16 * 16; i < depth; ++i) sum = __builtin_fmaf(x[i], Widen1(w[n * p.inputs + i]), sum);
      out[n] = add ? out[n] + sum : sum;
    }
  }
}

template <int kRows>
AVX2 void MultiplyByDots(const Product& p, int64_t k, int64_t depth, int64_t first, Line*) {
  const int64_t end = std::min(first + kWidth, p.outputs);
  int64_t output = first;
  for (; output + 3 <= end; output += 3) Dot<kRows, 3>(p, k, depth, output);
  for (; output < end; ++output) Dot<kRows, 1>(p, k, depth, output);
}
constexpr std::array<MultiplyRows, 4> kMultiplyByDots = {MultiplyByDots<1>, MultiplyByDots<2>, MultiplyByDots<3>,
                                                         MultiplyByDots<4>};

// Adds x[:, k .. k + inputs] times w [inputs, outputs] to the sums of outputs begin .. end, 8 kVectors outputs at a
// time. Returns where it stops: what is left is less than that. Reads w as it lies.
template <int kRows, int kVectors>
AVX2 inline int64_t AddAlong(const Product& p, int64_t k, int inputs, bool ahead, int64_t begin, int64_t end) {
  const bool add = k || p.add;
  const int64_t outputs = p.outputs, out_stride = p.out_stride, next = kAlong * outputs;
  const float* const x = p.wide;
  int64_t first = begin;
  for (; first + 8 * kVectors <= end; first += 8 * kVectors) {
    float* out = p.sums(first);
    __m256 sums[kRows][kVectors];
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        sums[r][v] = add ? _mm256_loadu_ps(out + r * out_stride + 8 * v) : _mm256_setzero_ps();
      }
    }
    const uint16_t* w = p.w + k * outputs + first;
    for (int i = 0; i < inputs; ++i, w += outputs) {
      if (ahead) _mm_prefetch(reinterpret_cast<const char*>(w + next), _MM_HINT_T0);
      __m256 weights[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) weights[v] = Widen8(w + 8 * v);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        const __m256 one = _mm256_broadcast_ss(x + r * kAlong + i);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm256_fmadd_ps(one, weights[v], sums[r][v]);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) _mm256_storeu_ps(out + r * out_stride + 8 * v, sums[r][v]);
    }
  }
  return first;
}

template <int kRows>
AVX2 void AddGroup(const Product& p, int64_t k, int inputs, bool ahead, int64_t begin, int64_t end) {
  begin = AddAlong<kRows, kRows == 2 ? 4 : kRows <= 4 ? 3 : 2>(p, k, inputs, ahead, begin, end);
  if constexpr (kRows <= 4) begin = AddAlong<kRows, 2>(p, k, inputs, ahead, begin, end);
  begin = AddAlong<kRows, 1>(p, k, inputs, ahead, begin, end);
  for (int64_t output = begin; output < end; ++output) {
    for (int r = 0; r < kRows; ++r) {
      float& out = p.sums(output)[r * p.out_stride];
      float sum = k || p.add ? out : 0;
      for (int i = 0; i < inputs; ++i) {
        sum = __builtin_fmaf(p.wide[r * kAlong + i], Widen1(p.w[(k + i) * p.outputs + output]), sum);
      }
      out = sum;
    }
  }
}
constexpr std::array kAddGroup = {AddGroup<1>, AddGroup<2>, AddGroup<3>, AddGroup<4>, AddGroup<5>, AddGroup<6>};

// Multiplies a few rows by w [inputs, outputs], a few rows of w at a time, from begin to end: memory is read along the
// rows of w, which processors prefetch by themselves, and nothing is packed.
AVX2 inline void MultiplyAlong(const Product& p, int64_t begin, int64_t end) {
  end = std::min(end, p.outputs);
  const int64_t blocks = (p.rows + kMostRows - 1) / kMostRows;
  float wide[kMostAlong * kAlong] = {};
  for (int64_t k = 0; k < p.inputs; k += kAlong) {
    const int inputs = static_cast<int>(std::min<int64_t>(kAlong, p.inputs - k));
    for (int64_t r = 0; r < p.rows; ++r) {
      for (int i = 0; i < inputs; ++i) wide[r * kAlong + i] = Widen1(p.x[r * p.x_stride + k + i]);
    }
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t row = p.rows * block / blocks, rows = p.rows * (block + 1) / blocks - row;
      Product part = p;
      part.wide = wide + row * kAlong;
      part.out += row * p.out_stride;
      kAddGroup[rows - 1](part, k, inputs, block == 0, begin, end);
    }
  }
}

// Multiplies a row by w [outputs, inputs], one dot product after the other. Sums in an order of its own.
AVX2 inline void DotRow(const Product& p, int64_t begin, int64_t end) {
  constexpr int64_t kInputs = 32;
  for (int64_t output = begin; output < std::min(end, p.outputs); ++output) {
    const uint16_t *w = p.w + output * p.inputs, *x = p.x;
    alignas(32) uint16_t last_w[kInputs], last_x[kInputs];
    __m256 sums[4] = {};
    for (int64_t k = 0; k < p.inputs; k += kInputs, w += kInputs, x += kInputs) {
      _mm_prefetch(reinterpret_cast<const char*>(w + 2 * p.inputs), _MM_HINT_T0);  // of the row after next
      if (const int64_t left = p.inputs - k; left < kInputs) {  // what follows the last input is not ours to read
        std::memset(last_w, 0, sizeof(last_w));
        std::memset(last_x, 0, sizeof(last_x));
        std::copy_n(w, left, last_w);
        std::copy_n(x, left, last_x);
        w = last_w;
        x = last_x;
      }
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        sums[2 * i] = _mm256_fmadd_ps(WidenEven(x + 16 * i), WidenEven(w + 16 * i), sums[2 * i]);
        sums[2 * i + 1] = _mm256_fmadd_ps(WidenOdd(x + 16 * i), WidenOdd(w + 16 * i), sums[2 * i + 1]);
      }
    }
    *p.sums(output) = SumOf(_mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3])));
  }
}

// Rounds sums [rows, outputs] to bfloat16.
AVX2 inline void Round(const float* sums, int64_t sums_stride, int64_t rows, int64_t outputs, uint16_t* out,
                       int64_t out_stride) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < outputs; i += 8) {
      const __m256 eight = _mm256_maskload_ps(sums + r * sums_stride + i, Lanes8(outputs - i));
      Store8(out + r * out_stride + i, Round8(eight), outputs - i);
    }
  }
}

// exp(x) for x <= 0, to two units in the last place; NaN stays NaN. Range reduction by Cody and Waite, then the
// Taylor series.
AVX2 inline __m256 Exp(__m256 x) {
  x = _mm256_max_ps(_mm256_set1_ps(-104.0f), x);
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), kNearest);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
  __m256 sum = _mm256_set1_ps(1.0f / 5040);
  for (const float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
    sum = _mm256_fmadd_ps(sum, r, _mm256_set1_ps(term));
  }
  // Times 2^n, by two factors: one alone would leave float32's range.
  const __m256i exponent = _mm256_cvtps_epi32(n), part = _mm256_srai_epi32(exponent, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256 first = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(part, bias), 23));
  const __m256i rest = _mm256_sub_epi32(exponent, part);
  const __m256 second = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
  return _mm256_mul_ps(_mm256_mul_ps(sum, first), second);
}

AVX2 inline float Softmax(const float* scores, int64_t keys, float scale, uint16_t* weights) {
  const __m256 lowest = _mm256_set1_ps(-std::numeric_limits<float>::infinity());
  __m256 peaks = lowest, sums = _mm256_setzero_ps();
  for (int64_t i = 0; i < keys; i += 8) {
    const __m256i lanes = Lanes8(keys - i);
    const __m256 eight = _mm256_maskload_ps(scores + i, lanes);
    peaks = _mm256_max_ps(peaks, _mm256_blendv_ps(lowest, eight, _mm256_castsi256_ps(lanes)));
  }
  alignas(32) float all[8];
  _mm256_store_ps(all, peaks);
  const __m256 peak = _mm256_set1_ps(*std::max_element(all, all + 8));
  for (int64_t i = 0; i < keys; i += 8) {
    const __m256i lanes = Lanes8(keys - i);
    const __m256 below = _mm256_sub_ps(_mm256_maskload_ps(scores + i, lanes), peak);
    const __m256 weight = Exp(_mm256_mul_ps(below, _mm256_set1_ps(scale)));
    sums = _mm256_add_ps(sums, _mm256_and_ps(weight, _mm256_castsi256_ps(lanes)));
    Store8(weights + i, Round8(weight), keys - i);
  }
  return SumOf(sums);
}

AVX2 inline Peak PeakOf(const float* values, int64_t count) {
  const float lowest = -std::numeric_limits<float>::infinity();
  __m256 peaks = _mm256_set1_ps(lowest), nan = _mm256_setzero_ps();
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    if (i % 16 == 0) _mm_prefetch(reinterpret_cast<const char*>(values + i + 1024), _MM_HINT_T0);
    const __m256 some = _mm256_loadu_ps(values + i);
    nan = _mm256_or_ps(nan, _mm256_cmp_ps(some, some, _CMP_UNORD_Q));
    peaks = _mm256_max_ps(peaks, some);
  }
  alignas(32) float all[8];
  _mm256_store_ps(all, peaks);
  float peak = *std::max_element(all, all + 8);
  bool any_nan = _mm256_movemask_ps(nan) != 0;
  for (; i < count; ++i) {
    any_nan |= values[i] != values[i];
    peak = std::max(peak, values[i]);
  }
  if (any_nan) return {std::numeric_limits<float>::quiet_NaN(), 0};
  int64_t first = 0;
  for (; first + 8 <= count; first += 8) {
    const __m256 equal = _mm256_cmp_ps(_mm256_loadu_ps(values + first), _mm256_set1_ps(peak), _CMP_EQ_OQ);
    if (const int lanes = _mm256_movemask_ps(equal)) return {peak, first + __builtin_ctz(lanes)};
  }
  while (values[first] != peak) ++first;
  return {peak, first};
}

AVX2 inline void Divide(const float* sums, float total, int64_t dim, uint16_t* out) {
  const __m256 by = _mm256_set1_ps(std::max(std::numeric_limits<float>::min(), total));
  for (int64_t i = 0; i < dim; i += 8) {
    const __m256 eight = _mm256_maskload_ps(sums + i, Lanes8(dim - i));
    Store8(out + i, Round8(_mm256_div_ps(eight, by)), dim - i);
  }
}

constexpr Vectors kPanels = {.rows = kMostRows,
                             .few_rows = 64,
                             .few_inputs = 128,
                             .many_inputs = kManyInputs,
                             .multiply = kMultiply.data(),
                             .pack_and_multiply = nullptr,
                             .pack = Pack,
                             .panel_lines = PanelLines,
                             .widen = WidenRows,
                             .wide_stride = kWideStride,
                             .multiply_along = MultiplyAlong,
                             .most_along = kMostAlong,
                             .dot_row = DotRow,
                             .round = Round,
                             .softmax = Softmax,
                             .peak = PeakOf,
                             .divide = Divide};
constexpr Vectors kDots = [] {
  Vectors dots = kPanels;
  dots.rows = kMultiplyByDots.size();
  dots.many_inputs = 1024;
  dots.multiply = kMultiplyByDots.data();
  dots.pack = nullptr;
  return dots;
}();

}  // namespace
}  // namespace avx2
