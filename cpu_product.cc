// Products of bfloat16 matrices on CPUs with AVX-512 BF16, as an XLA custom call (cpu_product.py).
//
// out[i, r, n] = sum over k of x[i, r, k] * w[i, k, n], or w[i, n, k]: a few or many rows times weights, keys or
// values that are stored plainly. A decode step reads every weight once for a handful of rows, so this has to
// keep up with memory, and a prompt has to keep the multipliers busy. XLA's own kernels repack the weights at
// each call, and widen keys and values to float32.
//
// The weights are read in stripes of kWidth outputs. As it is read, a stripe is interleaved the way VDPBF16PS
// wants it (two consecutive inputs beside each other), multiplied with the first kMostRows rows in registers,
// and kept as a panel for the rest. Sums run over the inputs in order whatever the number of rows, so that a
// row's result does not depend on its neighbours.

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

using Matrices = ffi::Buffer<ffi::BF16, 3>;  // as many matrices of one shape
using Sums = ffi::Buffer<ffi::F32, 3>;

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

namespace {

constexpr int64_t kWidth = 32;           // outputs of a stripe: two vectors of float32
constexpr int kMostRows = 12;            // at once: 24 sums, 2 permutations, 4 vectors of weights, 1 of x
constexpr int64_t kFewRows = 64;         // up to which the weights are what takes time, not the sums
constexpr int64_t kSumsBytes = 1 << 18;  // of sums that a thread works on: a part of the second-level cache
constexpr int64_t kAlone = 1 << 20;      // multiplications (of 8 rows at least) not worth a second thread

struct Product {
  const uint16_t* x;  // [rows, inputs]
  const uint16_t* w;  // [inputs, outputs] or, transposed, [outputs, inputs]
  float* out;         // [rows, outputs]
  int64_t rows, inputs, outputs;
  bool transposed;

  // A panel's inputs, and the outputs whose panels are packed before the next rows are looked at. With few rows
  // a panel of 16 KiB stays in the first-level cache and the weights flow; with many, 512 KiB stay in the
  // second and x flows. Rows of w [outputs, inputs] are read whole.
  int64_t depth() const { return rows <= kFewRows && !transposed ? 256 : 1024; }
  int64_t group() const { return kWidth * (rows <= kFewRows ? 1 : 8); }
};

// The first n of 32 (or 16) lanes.
inline uint32_t Lanes32(int64_t n) { return n >= 32 ? ~0u : (1u << std::max<int64_t>(n, 0)) - 1; }
inline uint16_t Lanes16(int64_t n) { return static_cast<uint16_t>(Lanes32(std::min<int64_t>(n, 16))); }

// panel[p][n] = (w[first + n, k + 2p], w[first + n, k + 2p + 1]) for w [outputs, inputs]: squares of 16
// outputs by 16 pairs of inputs are transposed.
AVX512_BF16 void PackColumns(const Product& p, int64_t k, int64_t depth, int64_t first, __m512i* panel) {
  for (int64_t half = 0; half < 2; ++half) {
    for (int64_t i = 0; i < depth; i += 32) {
      const __mmask32 lanes = Lanes32(depth - i);
      __m512i a[16], b[16];
#pragma GCC unroll 16
      for (int64_t n = 0; n < 16; ++n) {
        const int64_t output = first + 16 * half + n;
        const uint16_t* ahead = p.w + (output + kWidth) * p.inputs + k + i;  // the next stripe's
        _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T1);
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
      const int64_t pairs = depth - i < 32 ? (depth - i) / 2 : 16;
      for (int64_t n = 0; n < pairs; ++n) panel[i + 2 * n + half] = b[n];
    }
  }
}

// Adds x[row .. row + kRows, k .. k + depth] times the weights to the sums of outputs first .. first + kWidth.
// Takes the weights from the panel or, to pack it, from w [inputs, outputs]:
// panel[p][n] = (w[k + 2p, first + n], w[k + 2p + 1, first + n]).
template <int kRows, bool kPack>
AVX512_BF16 void Multiply(const Product& p, int64_t row, int64_t k, int64_t depth, int64_t first,
                          __m512i* panel) {
  alignas(64) static constexpr uint16_t kPairs[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                      37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                      11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i pairs_low = _mm512_load_si512(kPairs);
  const __m512i pairs_high = _mm512_add_epi16(pairs_low, _mm512_set1_epi16(16));
  const __mmask32 lanes = Lanes32(p.outputs - first);
  const __mmask16 low = Lanes16(p.outputs - first), high = Lanes16(p.outputs - first - 16);
  const bool keep = p.rows > kRows;
  const uint16_t* w = p.w + k * p.outputs + first;
  const uint16_t* x = p.x + row * p.inputs + k;
  float* out = p.out + row * p.outputs + first;
  __m512 sums[kRows][2];
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    sums[r][0] = k ? _mm512_maskz_loadu_ps(low, out + r * p.outputs) : _mm512_setzero_ps();
    sums[r][1] = k ? _mm512_maskz_loadu_ps(high, out + r * p.outputs + 16) : _mm512_setzero_ps();
  }
  for (int64_t i = 0; i < depth; i += 2) {
    __m512i w0, w1;
    if constexpr (kPack) {
      const uint16_t* even = w + i * p.outputs;
      const uint16_t* odd = even + p.outputs;
      _mm_prefetch(reinterpret_cast<const char*>(even + 2 * kWidth), _MM_HINT_T1);  // after next
      _mm_prefetch(reinterpret_cast<const char*>(odd + 2 * kWidth), _MM_HINT_T1);
      const __m512i a = _mm512_maskz_loadu_epi16(lanes, even), b = _mm512_maskz_loadu_epi16(lanes, odd);
      w0 = _mm512_permutex2var_epi16(a, pairs_low, b);
      w1 = _mm512_permutex2var_epi16(a, pairs_high, b);
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
      uint32_t pair;
      __builtin_memcpy(&pair, x + r * p.inputs + i, sizeof(pair));
      const __m512bh both = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(pair)));
      sums[r][0] = _mm512_dpbf16_ps(sums[r][0], both, reinterpret_cast<__m512bh>(w0));
      sums[r][1] = _mm512_dpbf16_ps(sums[r][1], both, reinterpret_cast<__m512bh>(w1));
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    _mm512_mask_storeu_ps(out + r * p.outputs, low, sums[r][0]);
    _mm512_mask_storeu_ps(out + r * p.outputs + 16, high, sums[r][1]);
  }
}

using MultiplyRows = void (*)(const Product&, int64_t, int64_t, int64_t, int64_t, __m512i*);
template <bool kPack, int... kRows>
constexpr std::array<MultiplyRows, kMostRows> Table(std::integer_sequence<int, kRows...>) {
  return {Multiply<kRows + 1, kPack>...};
}
constexpr auto kMultiply = Table<false>(std::make_integer_sequence<int, kMostRows>());
constexpr auto kPackAndMultiply = Table<true>(std::make_integer_sequence<int, kMostRows>());

// All rows of outputs begin .. end.
void MultiplyOutputs(const Product& p, int64_t begin, int64_t end) {
  struct alignas(64) Vector {
    uint16_t values[32];
  };
  thread_local std::vector<Vector> panels;
  panels.resize(p.depth() * p.group() / kWidth);
  const int64_t blocks = (p.rows + kMostRows - 1) / kMostRows;
  for (int64_t k = 0; k < p.inputs; k += p.depth()) {
    const int64_t depth = std::min(p.depth(), p.inputs - k);
    for (int64_t group = begin; group < end; group += p.group()) {
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t row = p.rows * block / blocks, rows = p.rows * (block + 1) / blocks - row;
        __m512i* panel = reinterpret_cast<__m512i*>(panels.data());
        for (int64_t first = group; first < std::min(group + p.group(), end); first += kWidth) {
          const bool pack = block == 0;
          if (pack && p.transposed) PackColumns(p, k, depth, first, panel);
          (pack && !p.transposed ? kPackAndMultiply : kMultiply)[rows - 1](p, row, k, depth, first, panel);
          panel += depth;
        }
      }
    }
  }
}

// Products that threads work on piece by piece: a chunk of one's outputs, or several small ones. Whoever is
// free claims the next piece, so the caller never waits for a thread that has not begun: calls side by side in
// one pool cannot block each other.
struct Claims {
  Product first;  // of `products`, one behind the other
  int64_t products, chunk, chunks, piece;
  std::atomic<int64_t> next{0}, done{0};

  int64_t pieces() const { return (products * chunks + piece - 1) / piece; }

  void Work() {
    for (int64_t claimed; (claimed = next.fetch_add(1)) < pieces();) {
      const int64_t end = std::min((claimed + 1) * piece, products * chunks);
      for (int64_t i = claimed * piece; i < end; ++i) {
        Product p = first;
        const int64_t product = i / chunks, begin = i % chunks * chunk;
        p.x += product * p.rows * p.inputs;
        p.w += product * p.inputs * p.outputs;
        p.out += product * p.rows * p.outputs;
        MultiplyOutputs(p, begin, std::min(begin + chunk, p.outputs));
      }
      done.fetch_add(1);
      done.notify_all();
    }
  }
};

ffi::Error Run(ffi::ThreadPool pool, Matrices x, Matrices w, ffi::Result<Sums> out, bool transposed) {
  const auto x_shape = x.dimensions(), w_shape = w.dimensions(), out_shape = out->dimensions();
  const int64_t products = x_shape[0], rows = x_shape[1], inputs = x_shape[2];
  const int64_t outputs = w_shape[2 - transposed];
  if (inputs % 2 || w_shape[0] != products || w_shape[1 + transposed] != inputs || out_shape[0] != products ||
      out_shape[1] != rows || out_shape[2] != outputs) {
    return ffi::Error::InvalidArgument("cpu_product: shapes do not fit, or an odd number of inputs");
  }
  if (products * rows * outputs == 0) return ffi::Error::Success();
  auto claims = std::make_shared<Claims>();
  claims->first = {reinterpret_cast<const uint16_t*>(x.typed_data()),
                   reinterpret_cast<const uint16_t*>(w.typed_data()),
                   out->typed_data(),
                   rows,
                   inputs,
                   outputs,
                   transposed};
  claims->products = products;
  const int64_t threads = std::max<int64_t>(pool.num_threads(), 1), wanted = 2 * threads;
  const int64_t stripes = (outputs + kWidth - 1) / kWidth;
  const int64_t share = products < wanted ? (stripes * products + wanted - 1) / wanted : stripes;
  const int64_t fit = std::max(kSumsBytes / (rows * 4 * kWidth), claims->first.group() / kWidth);
  claims->chunk = kWidth * std::min(share, fit);
  claims->chunks = (outputs + claims->chunk - 1) / claims->chunk;
  claims->piece = std::max<int64_t>(products / wanted, 1);
  const bool alone = products * std::max<int64_t>(rows, 8) * inputs * outputs < kAlone;
  const int64_t helpers = alone ? 0 : std::min(threads, claims->pieces()) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([claims] { claims->Work(); });
  claims->Work();
  for (int64_t done; (done = claims->done.load()) < claims->pieces();) claims->done.wait(done);
  return ffi::Error::Success();
}

bool Supported() { return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw"); }

}  // namespace

#else

namespace {

ffi::Error Run(ffi::ThreadPool, Matrices, Matrices, ffi::Result<Sums>, bool) {
  return ffi::Error(ffi::ErrorCode::kUnimplemented, "cpu_product: only for x86 with AVX-512 BF16");
}

bool Supported() { return false; }

}  // namespace

#endif

XLA_FFI_DEFINE_HANDLER_SYMBOL(CpuProduct, Run,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Matrices>()
                                  .Arg<Matrices>()
                                  .Ret<Sums>()
                                  .Attr<bool>("transposed"));

// Whether this machine can run CpuProduct.
extern "C" int CpuProductSupported() { return Supported(); }
