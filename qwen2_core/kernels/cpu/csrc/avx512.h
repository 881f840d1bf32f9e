// Sums bfloat16 products with VDPBF16PS (AVX-512 BF16: AMD since Zen 4, Intel Xeons of Cooper Lake and since Sapphire
// Rapids). One instruction multiplies pairs of consecutive inputs, so panels have these beside each other. Tiles
// (amx_tiles.h) take the same panels.

#pragma once

#include <immintrin.h>

#include <limits>

#include "product.h"

#define AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

namespace avx512 {
namespace {

constexpr int kMostRows = 12;  // at once: registers for 24 sums, 2 permutations, 4 vectors of weights, 1 of x

// A mask of the first n of 32 (or 16) lanes.
inline uint32_t Lanes32(int64_t n) { return n >= 32 ? ~0u : (1u << std::max<int64_t>(n, 0)) - 1; }
inline uint16_t Lanes16(int64_t n) { return static_cast<uint16_t>(Lanes32(std::min<int64_t>(n, 16))); }

// The length of a panel of `depth` inputs, padded with zeros, and the distance between panels. The distance is not a
// power of two, which would map the same line of all panels to one place of the cache.
constexpr int64_t Padded(int64_t depth) { return (depth + 31) / 32 * 32; }
constexpr int64_t PanelStride(int64_t depth) { return Padded(depth) + 2; }

// Packs a panel of w [outputs, inputs]: panel[p][n] = (w[first + n, k + 2p], w[first + n, k + 2p + 1]). Transposes
// squares of 16 outputs by 16 pairs of inputs.
AVX512_BF16 inline void PackColumns(const Product& p, int64_t k, int64_t depth, int64_t first, Line* lines) {
  auto* panel = reinterpret_cast<__m512i*>(lines);
  Ahead ahead = p.ahead;
  const int64_t each = ahead.each(2 * ((depth + 31) / 32));
  for (int64_t half = 0; half < 2; ++half) {
    for (int64_t i = 0; i < depth; i += 32) {
      ahead.Prefetch(each);
      const __mmask32 lanes = Lanes32(depth - i);
      __m512i a[16], b[16];
#pragma GCC unroll 16
      for (int64_t n = 0; n < 16; ++n) {
        const int64_t output = first + 16 * half + n;
        a[n] = output < p.outputs ? _mm512_maskz_loadu_epi16(lanes, p.w + output * p.inputs + k + i)
                                  : _mm512_setzero_si512();
      }
#pragma GCC unroll 8
      for (int n = 0; n < 16; n += 2) {
        b[n] = _mm512_unpacklo_epi32(a[n], a[n + 1]);
        b[n + 1] = _mm512_unpackhi_epi32(a[n], a[n + 1]);
      }
#pragma GCC unroll 4
      for (int n = 0; n < 16; n += 4) {
        a[n] = _mm512_unpacklo_epi64(b[n], b[n + 2]);
        a[n + 1] = _mm512_unpackhi_epi64(b[n], b[n + 2]);
        a[n + 2] = _mm512_unpacklo_epi64(b[n + 1], b[n + 3]);
        a[n + 3] = _mm512_unpackhi_epi64(b[n + 1], b[n + 3]);
      }
      // a[4 g + j], lane q: pair 4 q + j of outputs 4 g .. 4 g + 3. Lanes and groups change places.
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const __m512i low01 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x44);
        const __m512i high01 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xee);
        const __m512i low23 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x44);
        const __m512i high23 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xee);
        b[j] = _mm512_shuffle_i32x4(low01, low23, 0x88);
        b[4 + j] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
        b[8 + j] = _mm512_shuffle_i32x4(high01, high23, 0x88);
        b[12 + j] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
      }
      for (int64_t n = 0; n < 16; ++n) panel[i + 2 * n + half] = b[n];
    }
  }
}

// The permutation that interleaves outputs first .. first + 16 of two vectors of 32.
AVX512_BF16 inline __m512i PairsOf(int first) {
  alignas(64) static constexpr uint16_t kPairs[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                      37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                      11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  return _mm512_add_epi16(_mm512_load_si512(kPairs), _mm512_set1_epi16(static_cast<int16_t>(first)));
}

// Two inputs of a row of x, repeated for all outputs.
AVX512_BF16 inline __m512bh Broadcast(const uint16_t* x) {
  uint32_t pair;
  __builtin_memcpy(&pair, x, sizeof(pair));
  return reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(pair)));
}

// A stripe has kWidth outputs, or fewer at the end of a row, which masks tell.
template <bool kWhole>
AVX512_BF16 inline __m512i LoadWeights(__mmask32 lanes, const uint16_t* w) {
  return kWhole ? _mm512_loadu_si512(w) : _mm512_maskz_loadu_epi16(lanes, w);
}
template <bool kWhole>
AVX512_BF16 inline __m512 LoadSums(__mmask16 lanes, const float* sums) {
  return kWhole ? _mm512_loadu_ps(sums) : _mm512_maskz_loadu_ps(lanes, sums);
}
template <bool kWhole>
AVX512_BF16 inline void StoreSums(float* to, __mmask16 lanes, __m512 sums) {
  kWhole ? _mm512_storeu_ps(to, sums) : _mm512_mask_storeu_ps(to, lanes, sums);
}

// Adds the first kRows of x[:, k .. k + depth] times the weights to the sums of outputs first .. first + kWidth.
// Takes the weights from the panel or, if kPack, packs the panel from w [inputs, outputs]:
// panel[p][n] = (w[k + 2p, first + n], w[k + 2p + 1, first + n]).
template <int kRows, bool kPack, bool kWhole>
AVX512_BF16 void MultiplyStripe(const Product& p, int64_t k, int64_t depth, int64_t first, Line* lines) {
  auto* panel = reinterpret_cast<__m512i*>(lines);
  const __m512i pairs_low = PairsOf(0), pairs_high = PairsOf(16);
  const __mmask32 lanes = Lanes32(p.outputs - first);
  const __mmask16 low = Lanes16(p.outputs - first), high = Lanes16(p.outputs - first - 16);
  const bool keep = p.rows > kRows;
  const uint16_t* w = p.w + k * p.outputs + first;
  const uint16_t* x = p.x + k;
  float* out = p.sums(first);
  const bool add = k || p.add;
  Ahead ahead = p.ahead;
  const int64_t each = ahead.each(depth / 2);
  __m512 sums[kRows][2];
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    sums[r][0] = add ? LoadSums<kWhole>(low, out + r * p.out_stride) : _mm512_setzero_ps();
    sums[r][1] = add ? LoadSums<kWhole>(high, out + r * p.out_stride + 16) : _mm512_setzero_ps();
  }
  for (int64_t i = 0; i < depth; i += 2) {
    ahead.Prefetch(each);
    __m512i w0, w1;
    if constexpr (kPack) {
      const __m512i even = LoadWeights<kWhole>(lanes, w + i * p.outputs);
      const __m512i odd = LoadWeights<kWhole>(lanes, w + (i + 1) * p.outputs);
      w0 = _mm512_permutex2var_epi16(even, pairs_low, odd);
      w1 = _mm512_permutex2var_epi16(even, pairs_high, odd);
      if (keep) {
        panel[i] = w0;
        panel[i + 1] = w1;
      }
    } else {
      w0 = panel[i];
      w1 = panel[i + 1];
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const __m512bh both = Broadcast(x + r * p.x_stride + i);
      sums[r][0] = _mm512_dpbf16_ps(sums[r][0], both, reinterpret_cast<__m512bh>(w0));
      sums[r][1] = _mm512_dpbf16_ps(sums[r][1], both, reinterpret_cast<__m512bh>(w1));
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    StoreSums<kWhole>(out + r * p.out_stride, low, sums[r][0]);
    StoreSums<kWhole>(out + r * p.out_stride + 16, high, sums[r][1]);
  }
}
template <int kRows, bool kPack>
AVX512_BF16 void Multiply(const Product& p, int64_t k, int64_t depth, int64_t first, Line* panel) {
  const bool whole = p.outputs - first >= kWidth;
  (whole ? MultiplyStripe<kRows, kPack, true> : MultiplyStripe<kRows, kPack, false>)(p, k, depth, first, panel);
}

// Packs the panels of outputs begin .. end of w [inputs, outputs], as Multiply does, but reads whole rows of w, which
// processors prefetch by themselves. `depth` may be odd; then zeros take the place of the missing input.
AVX512_BF16 inline void PackRows(const Product& p, int64_t k, int64_t depth, int64_t begin, int64_t end,
                                 Line* lines) {
  auto* panels = reinterpret_cast<__m512i*>(lines);
  const __m512i pairs_low = PairsOf(0), pairs_high = PairsOf(16);
  for (int64_t i = 0; i < depth; i += 2) {
    const uint16_t* even = p.w + (k + i) * p.outputs;
    const uint16_t* odd = even + p.outputs;
    const int64_t ahead = 8 * p.outputs;
    __m512i* panel = panels + i;
    for (int64_t first = begin; first < end; first += kWidth, panel += PanelStride(depth)) {
      _mm_prefetch(reinterpret_cast<const char*>(even + ahead + first), _MM_HINT_T1);
      _mm_prefetch(reinterpret_cast<const char*>(odd + ahead + first), _MM_HINT_T1);
      const __mmask32 lanes = Lanes32(p.outputs - first);
      const __m512i a = _mm512_maskz_loadu_epi16(lanes, even + first);
      const __m512i b = _mm512_maskz_loadu_epi16(i + 1 < depth ? lanes : 0, odd + first);
      panel[0] = _mm512_permutex2var_epi16(a, pairs_low, b);
      panel[1] = _mm512_permutex2var_epi16(a, pairs_high, b);
    }
  }
  for (int64_t first = begin; first < end; first += kWidth, panels += PanelStride(depth)) {
    std::fill(panels + (depth + 1) / 2 * 2, panels + Padded(depth), _mm512_setzero_si512());
  }
}

template <bool kPack, int... kRows>
constexpr std::array<MultiplyRows, kMostRows> Table(std::integer_sequence<int, kRows...>) {
  return {Multiply<kRows + 1, kPack>...};
}
constexpr auto kMultiply = Table<false>(std::make_integer_sequence<int, kMostRows>());
constexpr auto kPackAndMultiply = Table<true>(std::make_integer_sequence<int, kMostRows>());

// With a single row nothing is reused, so the next two functions read memory in the fastest order.
//
// Multiplies a row by w [inputs, outputs], a few rows of w at a time, from begin to end. Sums in the order of Multiply.
AVX512_BF16 inline void MultiplyRow(const Product& p, int64_t begin, int64_t end) {
  constexpr int kPairs = 8;
  const __m512i pairs_low = PairsOf(0), pairs_high = PairsOf(16);
  for (int64_t k = 0; k < p.inputs; k += 2 * kPairs) {
    const int pairs = static_cast<int>(std::min<int64_t>(kPairs, (p.inputs - k) / 2));
    __m512bh x[kPairs];
    for (int i = 0; i < pairs; ++i) x[i] = Broadcast(p.x + k + 2 * i);
    for (int64_t first = begin; first < end; first += kWidth) {
      const __mmask32 lanes = Lanes32(p.outputs - first);
      const __mmask16 low = Lanes16(p.outputs - first), high = Lanes16(p.outputs - first - 16);
      const bool add = k || p.add;
      float* out = p.sums(first);
      __m512 sums0 = add ? _mm512_maskz_loadu_ps(low, out) : _mm512_setzero_ps();
      __m512 sums1 = add ? _mm512_maskz_loadu_ps(high, out + 16) : _mm512_setzero_ps();
      const uint16_t* even = p.w + k * p.outputs + first;
#pragma GCC unroll 8
      for (int i = 0; i < kPairs; ++i) {
        if (i == pairs) break;
        const uint16_t* odd = even + p.outputs;
        _mm_prefetch(reinterpret_cast<const char*>(even + 2 * kPairs * p.outputs), _MM_HINT_T0);  // the next ones
        _mm_prefetch(reinterpret_cast<const char*>(odd + 2 * kPairs * p.outputs), _MM_HINT_T0);
        const __m512i a = _mm512_maskz_loadu_epi16(lanes, even), b = _mm512_maskz_loadu_epi16(lanes, odd);
        const __m512i w0 = _mm512_permutex2var_epi16(a, pairs_low, b);
        const __m512i w1 = _mm512_permutex2var_epi16(a, pairs_high, b);
        sums0 = _mm512_dpbf16_ps(sums0, x[i], reinterpret_cast<__m512bh>(w0));
        sums1 = _mm512_dpbf16_ps(sums1, x[i], reinterpret_cast<__m512bh>(w1));
        even = odd + p.outputs;
      }
      _mm512_mask_storeu_ps(out, low, sums0);
      _mm512_mask_storeu_ps(out + 16, high, sums1);
    }
  }
}

// Multiplies a row by w [outputs, inputs], one dot product after the other. Sums in an order of its own.
AVX512_BF16 inline void DotRow(const Product& p, int64_t begin, int64_t end) {
  constexpr int kSums = 4;
  for (int64_t output = begin; output < std::min(end, p.outputs); ++output) {
    const uint16_t* w = p.w + output * p.inputs;
    __m512 sums[kSums] = {};
    for (int64_t k = 0; k < p.inputs; k += 32 * kSums) {
#pragma GCC unroll 4
      for (int i = 0; i < kSums; ++i) {
        const int64_t first = k + 32 * i;
        _mm_prefetch(reinterpret_cast<const char*>(w + 2 * p.inputs + first), _MM_HINT_T0);  // the row after next
        const __mmask32 lanes = Lanes32(p.inputs - first);
        const __m512i a = _mm512_maskz_loadu_epi16(lanes, p.x + first);
        const __m512i b = _mm512_maskz_loadu_epi16(lanes, w + first);
        sums[i] = _mm512_dpbf16_ps(sums[i], reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
      }
    }
    *p.sums(output) = _mm512_reduce_add_ps((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
}

// Rounds sums [rows, outputs] to bfloat16.
AVX512_BF16 inline void Round(const float* sums, int64_t sums_stride, int64_t rows, int64_t outputs, uint16_t* out,
                              int64_t out_stride) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < outputs; i += 16) {
      const __mmask16 lanes = Lanes16(outputs - i);
      const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(lanes, sums + r * sums_stride + i));
      _mm256_mask_storeu_epi16(out + r * out_stride + i, lanes, reinterpret_cast<__m256i>(rounded));
    }
  }
}

// exp(x) for x <= 0, to two units in the last place; NaN stays NaN. Range reduction by Cody and Waite, then the
// Taylor series.
AVX512_BF16 inline __m512 Exp(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-104.0f), x);
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 sum = _mm512_set1_ps(1.0f / 5040);
  for (const float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(term));
  }
  return _mm512_scalef_ps(sum, n);
}

AVX512_BF16 inline float Softmax(const float* scores, int64_t keys, float scale, uint16_t* weights) {
  __m512 peaks = _mm512_set1_ps(-std::numeric_limits<float>::infinity()), sums = _mm512_setzero_ps();
  for (int64_t i = 0; i < keys; i += 16) {
    peaks = _mm512_mask_max_ps(peaks, Lanes16(keys - i), peaks, _mm512_maskz_loadu_ps(Lanes16(keys - i), scores + i));
  }
  const __m512 peak = _mm512_set1_ps(_mm512_reduce_max_ps(peaks));
  for (int64_t i = 0; i < keys; i += 16) {
    const __mmask16 lanes = Lanes16(keys - i);
    const __m512 below = _mm512_sub_ps(_mm512_maskz_loadu_ps(lanes, scores + i), peak);
    const __m512 weight = Exp(_mm512_mul_ps(below, _mm512_set1_ps(scale)));
    sums = _mm512_mask_add_ps(sums, lanes, sums, weight);
    const __m256bh rounded = _mm512_cvtneps_pbh(weight);
    _mm256_mask_storeu_epi16(weights + i, lanes, reinterpret_cast<__m256i>(rounded));
  }
  return _mm512_reduce_add_ps(sums);
}

AVX512_BF16 inline Peak PeakOf(const float* values, int64_t count) {
  const __m512 lowest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  __m512 peaks = lowest;
  __mmask16 nan = 0;
  for (int64_t i = 0; i < count; i += 16) {
    _mm_prefetch(reinterpret_cast<const char*>(values + i + 1024), _MM_HINT_T0);
    const __m512 some = _mm512_mask_loadu_ps(lowest, Lanes16(count - i), values + i);
    nan |= _mm512_cmp_ps_mask(some, some, _CMP_UNORD_Q);
    peaks = _mm512_max_ps(peaks, some);
  }
  const float peak = _mm512_reduce_max_ps(peaks);
  if (nan) return {std::numeric_limits<float>::quiet_NaN(), 0};
  for (int64_t i = 0;; i += 16) {
    const __mmask16 lanes = Lanes16(count - i);
    const __m512 some = _mm512_maskz_loadu_ps(lanes, values + i);
    const __mmask16 equal = _mm512_mask_cmp_ps_mask(lanes, some, _mm512_set1_ps(peak), _CMP_EQ_OQ);
    if (equal) return {peak, i + __builtin_ctz(equal)};
  }
}

AVX512_BF16 inline void Divide(const float* sums, float total, int64_t dim, uint16_t* out) {
  const __m512 by = _mm512_set1_ps(std::max(std::numeric_limits<float>::min(), total));
  for (int64_t i = 0; i < dim; i += 16) {
    const __mmask16 lanes = Lanes16(dim - i);
    const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_div_ps(_mm512_maskz_loadu_ps(lanes, sums + i), by));
    _mm256_mask_storeu_epi16(out + i, lanes, reinterpret_cast<__m256i>(rounded));
  }
}

constexpr Vectors kVectors = {.rows = kMostRows,
                              .few_rows = 512,
                              .few_inputs = 256,
                              .many_inputs = 1024,
                              .multiply = kMultiply.data(),
                              .pack_and_multiply = kPackAndMultiply.data(),
                              .pack = PackColumns,
                              .panel_lines = PanelStride,
                              .widen = nullptr,
                              .wide_stride = 0,
                              .multiply_along = MultiplyRow,
                              .most_along = 1,
                              .dot_row = DotRow,
                              .round = Round,
                              .softmax = Softmax,
                              .peak = PeakOf,
                              .divide = Divide};

}  // namespace
}  // namespace avx512
