// Summarizes logits on CPUs, as an XLA custom call (cpu/logits.py): of each row the largest one, where it is first, and
// log(sum(exp(logits))). XLA reads the logits once for each of these, and writes some of what it computes for them.

#include "kernels.h"

#include <cmath>
#include <limits>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

using Logits = ffi::Buffer<ffi::F32, 2>;  // [rows, vocabulary]
using Floats = ffi::Buffer<ffi::F32, 1>;
using Indices = ffi::Buffer<ffi::S32, 1>;

#ifdef CPU_KERNELS

namespace {

// Rows are read in pieces of this many logits, which fit in the first-level cache. It says how sums are rounded, so it
// does not depend on the machine.
constexpr int64_t kPiece = 4096;

struct Piece {
  Peak peak;
  float sum;  // of exp(logit - peak)
};

Piece Summarize(const Vectors& vectors, const float* logits, int64_t count) {
  alignas(64) thread_local uint16_t weights[kPiece];
  const Peak peak = vectors.peak(logits, count);
  const bool nothing = peak.value == -std::numeric_limits<float>::infinity();  // exp(-inf - -inf) would be NaN
  return {peak, nothing ? 0 : vectors.softmax(logits, count, 1, weights)};
}

ffi::Error Run(ffi::ThreadPool pool, Logits logits, ffi::Result<Floats> peaks, ffi::Result<Indices> firsts,
               ffi::Result<Floats> log_sums, int64_t instructions) {
  const int64_t rows = logits.dimensions()[0], size = logits.dimensions()[1];
  for (const int64_t results : {peaks->dimensions()[0], firsts->dimensions()[0], log_sums->dimensions()[0]}) {
    if (results != rows || size == 0) return ffi::Error::InvalidArgument("cpu_logits: shapes do not fit");
  }
  const Vectors& vectors = VectorsOf(Choose(instructions));
  const float* values = logits.typed_data();
  const int64_t threads = Threads(pool), pieces = (size + kPiece - 1) / kPiece;
  const int64_t together = std::max<int64_t>(rows * pieces / (4 * threads), 1);  // pieces that a thread reads in order
  std::vector<Piece> all(rows * pieces);
  Piece* const found = all.data();
  Share(pool, threads, (rows * pieces + together - 1) / together, [=, &vectors](int64_t claimed) {
    for (int64_t i = claimed * together; i < std::min((claimed + 1) * together, rows * pieces); ++i) {
      const int64_t row = i / pieces, begin = i % pieces * kPiece;
      found[i] = Summarize(vectors, values + row * size + begin, std::min(kPiece, size - begin));
    }
  });
  for (int64_t row = 0; row < rows; ++row) {
    const Piece* const of_row = found + row * pieces;
    int64_t best = 0;
    for (int64_t i = 1; i < pieces; ++i) {
      if (of_row[i].peak.value > of_row[best].peak.value) best = i;
    }
    const float peak = of_row[best].peak.value;
    float sum = 0;
    for (int64_t i = 0; i < pieces; ++i) {
      if (of_row[i].sum != 0) sum += of_row[i].sum * std::exp(of_row[i].peak.value - peak);
    }
    peaks->typed_data()[row] = peak;
    firsts->typed_data()[row] = static_cast<int32_t>(best * kPiece + of_row[best].peak.first);
    log_sums->typed_data()[row] = peak + std::log(sum);
  }
  return ffi::Error::Success();
}

}  // namespace

#else

namespace {

ffi::Error Run(ffi::ThreadPool, Logits, ffi::Result<Floats>, ffi::Result<Indices>, ffi::Result<Floats>, int64_t) {
  return ffi::Error(ffi::ErrorCode::kUnimplemented, "cpu_logits: only for x86 with AVX2");
}

}  // namespace

#endif

XLA_FFI_DEFINE_HANDLER_SYMBOL(CpuLogits, Run,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Logits>()
                                  .Ret<Floats>()
                                  .Ret<Indices>()
                                  .Ret<Floats>()
                                  .Attr<int64_t>("instructions"));
