// Multiplies bfloat16 matrices on CPUs with AVX2, AVX-512 BF16 or AMX, as an XLA custom call (cpu/matmul.py).
//
// out[i, r, n] = sum over k of x[i, r, k] * w[i, k, n], or w[i, n, k]: a few or many rows times weights that are
// stored row by row. w may be a stack of as many matrices for each of several layers, of which `layer` is taken where
// it lies: XLA would copy a layer's weights out of the stack. A decode step reads every weight once for a handful of
// rows, so the kernel must read as fast as the memory allows. A prompt must keep the multipliers busy. XLA's own
// kernels repack the weights at each call.

#include "kernels.h"

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

using Matrices = ffi::Buffer<ffi::BF16, 3>;  // several matrices of one shape
using Index = ffi::Buffer<ffi::S32, 0>;
using Sums = ffi::AnyBuffer;  // float32, or rounded to bfloat16

#ifdef CPU_KERNELS

namespace {

constexpr int64_t kSumsBytes = 1 << 19;  // sums that a thread works on: they fit in part of the second-level cache
constexpr int64_t kAlone = 1 << 20;      // fewer multiplications (of at least 8 rows) are not worth a second thread

ffi::Error Run(ffi::ThreadPool pool, Matrices x, Matrices w, Index layer, ffi::Result<Sums> out, bool transposed,
               int64_t instructions) {
  const auto x_shape = x.dimensions(), w_shape = w.dimensions(), out_shape = out->dimensions();
  const int64_t products = x_shape[0], rows = x_shape[1], inputs = x_shape[2];
  const int64_t outputs = w_shape[2 - transposed];
  const bool rounded = out->element_type() == ffi::BF16;
  const int64_t layers = products ? w_shape[0] / products : 0;
  if (inputs % 2 || w_shape[0] != layers * products || w_shape[1 + transposed] != inputs || out_shape[0] != products ||
      out_shape[1] != rows || out_shape[2] != outputs || !(rounded || out->element_type() == ffi::F32)) {
    return ffi::Error::InvalidArgument("cpu_matmul: shapes do not fit, or an odd number of inputs");
  }
  if (products * rows * outputs == 0) return ffi::Error::Success();
  if (layers == 0) return ffi::Error::InvalidArgument("cpu_matmul: no weights");
  const int64_t first_matrix = std::clamp<int64_t>(*layer.typed_data(), 0, layers - 1) * products;
  const Product first = {.x = reinterpret_cast<const uint16_t*>(x.typed_data()),
                         .w = reinterpret_cast<const uint16_t*>(w.typed_data()) + first_matrix * inputs * outputs,
                         .out = rounded ? nullptr : static_cast<float*>(out->untyped_data()),
                         .rows = rows,
                         .inputs = inputs,
                         .outputs = outputs,
                         .x_stride = inputs,
                         .out_stride = outputs,
                         .transposed = transposed,
                         .instructions = Choose(instructions),
                         .rounded = rounded ? static_cast<uint16_t*>(out->untyped_data()) : nullptr};
  const int64_t threads = Threads(pool);
  // One piece a thread reads long rows of w; two a thread leave fewer threads idle at the end.
  const int64_t wanted = rows == 1 || first.tiles() || Blocking(first).few ? threads : 2 * threads;
  const int64_t stripes = (outputs + kWidth - 1) / kWidth;
  const int64_t share = products < wanted ? (stripes * products + wanted - 1) / wanted : stripes;
  const int64_t fit = std::max(kSumsBytes / (rows * 4 * kWidth), Blocking(first).outputs / kWidth);
  const auto ceil = [](int64_t count, int64_t size) { return (count + size - 1) / size; };
  // Where there are more chunks than threads, each thread gets the same number.
  const int64_t most = ceil(stripes, std::min(share, fit));
  const int64_t chunk = kWidth * ceil(stripes, most > threads ? ceil(most, threads) * threads : most);
  const int64_t chunks = ceil(outputs, chunk);
  // A piece is a chunk of one product's outputs, or of several small products.
  const int64_t piece = std::max<int64_t>(products / wanted, 1);
  const bool alone = products * std::max<int64_t>(rows, 8) * inputs * outputs < kAlone;
  Share(pool, alone ? 1 : threads, (products * chunks + piece - 1) / piece, [=](int64_t claimed) {
    const int64_t end = std::min((claimed + 1) * piece, products * chunks);
    for (int64_t i = claimed * piece; i < end; ++i) {
      Product p = first;
      const int64_t product = i / chunks, begin = i % chunks * chunk;
      p.x += product * rows * inputs;
      p.w += product * inputs * outputs;
      if (rounded) {
        p.rounded += product * rows * outputs;
      } else {
        p.out += product * rows * outputs;
      }
      MultiplyOutputs(p, begin, std::min(begin + chunk, outputs));
    }
  });
  return ffi::Error::Success();
}

int Best() { return static_cast<int>(Supported()); }

}  // namespace

#else

namespace {

ffi::Error Run(ffi::ThreadPool, Matrices, Matrices, Index, ffi::Result<Sums>, bool, int64_t) {
  return ffi::Error(ffi::ErrorCode::kUnimplemented, "cpu_matmul: only for x86 with AVX2");
}

int Best() { return -1; }

}  // namespace

#endif

XLA_FFI_DEFINE_HANDLER_SYMBOL(CpuMatmul, Run,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Matrices>()
                                  .Arg<Matrices>()
                                  .Arg<Index>()
                                  .Ret<Sums>()
                                  .Attr<bool>("transposed")
                                  .Attr<int64_t>("instructions"));

// The version of the handlers. Count it up, here and in cpu/library.py (_INTERFACE), when their names, arguments or
// results change.
extern "C" int CpuInterface() { return 8; }

// The best instructions that the kernels can use on this machine (product.h), or -1 where they cannot run.
extern "C" int CpuInstructions() { return Best(); }
