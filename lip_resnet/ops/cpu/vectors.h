// Vectors of one cache line, exp on them, and the storage types: shared by the CPU kernels. They use the vector
// extensions of GCC and Clang, so the source compiles for every CPU.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace {

enum DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

// ---- vectors of one cache line: 16 floats or 8 doubles ------------------------------------------------------------

typedef float VecF __attribute__((vector_size(64)));
typedef double VecD __attribute__((vector_size(64)));
typedef int32_t IntF __attribute__((vector_size(64)));
typedef int64_t IntD __attribute__((vector_size(64)));
typedef uint16_t Half16 __attribute__((vector_size(32)));
typedef uint32_t Word16 __attribute__((vector_size(64)));

template <class A> struct Traits;
template <> struct Traits<float> {
  typedef VecF Vec;
  typedef IntF Int;
  static constexpr int kMantissa = 23;
  static constexpr float kLowest = -86.5f, kMagic = 12582912.0f + 127.0f, kLog2e = 1.44269504f;
  static constexpr float kLn2[] = {0.693147182f};
  static constexpr float kSeries[] = {1.0f, 1.0f, 0.5f, 1.0f / 6, 1.0f / 24, 1.0f / 120, 1.0f / 720, 1.0f / 5040};
};
template <> struct Traits<double> {
  typedef VecD Vec;
  typedef IntD Int;
  static constexpr int kMantissa = 52;
  static constexpr double kLowest = -707.0, kMagic = 6755399441055744.0 + 1023.0, kLog2e = 1.44269504088896340736;
  static constexpr double kLn2[] = {6.93145751953125e-1, 1.42860682030941723212e-6};
  static constexpr double kSeries[] = {1.0, 1.0, 1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720, 1.0 / 5040,
                                       1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600,
                                       1.0 / 6227020800};
};
template <class A> using Vec = typename Traits<A>::Vec;
template <class A> constexpr int64_t lanes() { return 64 / sizeof(A); }

struct BFloat16 {
  uint16_t bits;
};
template <class S> struct SumOf {  // the type in which values of storage type S are added
  typedef S Type;
  static constexpr DType kType = sizeof(S) == 8 ? kFloat64 : kFloat32;
};
template <> struct SumOf<BFloat16> {
  typedef float Type;
  static constexpr DType kType = kBFloat16;
};
template <class S> using Sum = typename SumOf<S>::Type;

template <class A> inline Vec<A> load(const A* p) {
  Vec<A> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class A> inline void store(A* p, Vec<A> v) { std::memcpy(p, &v, sizeof v); }

// Non-temporal store of a whole vector to a 64-byte-aligned address: past the caches, so the line is not read first.
template <class A> inline void stream(A* p, Vec<A> v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#elif defined(__AVX__)
  __m256i half[2];
  std::memcpy(half, &v, sizeof v);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), half[0]);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p) + 1, half[1]);
#else
  store<A>(p, v);
#endif
}
// Makes this thread's non-temporal stores visible to all threads.
inline void finish_streams() {
#if defined(__AVX__)
  _mm_sfence();
#endif
}

// Prefetches the cache line 4 KB ahead of p: the hardware prefetcher stops at page boundaries and follows few streams
// at once. Harmless beyond the end of an array.
template <class A> inline void prefetch(const A* p) { __builtin_prefetch(reinterpret_cast<const char*>(p) + 4096); }
template <class A> inline Vec<A> splat(A a) { return Vec<A>{} + a; }

#if defined(__AVX512F__)
inline VecF larger(VecF a, VecF b) { return (VecF)_mm512_max_ps((__m512)a, (__m512)b); }
inline VecD larger(VecD a, VecD b) { return (VecD)_mm512_max_pd((__m512d)a, (__m512d)b); }
#elif defined(__AVX__)  // GCC compiles ?: on vectors wider than the CPU's registers to scalar code
inline VecF larger(VecF a, VecF b) {
  __m256 x[2], y[2];
  std::memcpy(x, &a, sizeof a);
  std::memcpy(y, &b, sizeof b);
  for (int half : {0, 1}) x[half] = _mm256_max_ps(x[half], y[half]);
  std::memcpy(&a, x, sizeof a);
  return a;
}
inline VecD larger(VecD a, VecD b) {
  __m256d x[2], y[2];
  std::memcpy(x, &a, sizeof a);
  std::memcpy(y, &b, sizeof b);
  for (int half : {0, 1}) x[half] = _mm256_max_pd(x[half], y[half]);
  std::memcpy(&a, x, sizeof a);
  return a;
}
#else
template <class V> inline V larger(V a, V b) { return a > b ? a : b; }  // b if either is NaN
#endif

// exp(d) for d from kLowest to -kLowest: 2^n by the bits of a float, times exp(d - n log 2) by its Taylor series, whose
// argument is at most log(2) / 2: the first omitted term is below the rounding error.
template <class A> inline Vec<A> exp_within(Vec<A> d) {
  typedef Traits<A> T;
  constexpr int order = sizeof(T::kSeries) / sizeof(A) - 1;
  const Vec<A> shifted = d * T::kLog2e + T::kMagic;
  const Vec<A> n = shifted - T::kMagic;
  for (A part : T::kLn2) d = d - n * part;
  Vec<A> sum = splat<A>(T::kSeries[order]);
#pragma GCC unroll 16
  for (int k = order - 1; k >= 0; --k) sum = sum * d + T::kSeries[k];
  typename T::Int bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = bits << T::kMantissa;
  Vec<A> scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return sum * scale;
}

// exp(d) for d <= 0, NaN for NaN. Below kLowest the result is exp(kLowest), 1e-37 or less beside the window's largest
// weight, which is 1.
template <class A> inline Vec<A> exp_nonpositive(Vec<A> d) {
  return exp_within<A>(larger(splat<A>(Traits<A>::kLowest), d));
}

// ---- storage types <-> vectors --------------------------------------------------------------------------------------

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t width_of(int dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

inline VecF widen(Half16 h, int dtype) {
  if (dtype == kBFloat16) {
#if defined(__AVX512F__)  // for GCC, which converts the halves of the vector one after the other
    const Word16 word = (Word16)_mm512_cvtepu16_epi32((__m256i)h) << 16;
#else
    const Word16 word = __builtin_convertvector(h, Word16) << 16;
#endif
    VecF v;
    std::memcpy(&v, &word, sizeof v);
    return v;
  }
#if defined(__AVX512F__)
  return (VecF)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
  VecF v;
  __m128i low, high;
  std::memcpy(&low, &h, 16);
  std::memcpy(&high, reinterpret_cast<const char*>(&h) + 16, 16);
  const __m256 a = _mm256_cvtph_ps(low), b = _mm256_cvtph_ps(high);
  std::memcpy(&v, &a, 32);
  std::memcpy(reinterpret_cast<char*>(&v) + 32, &b, 32);
  return v;
#else
  typedef _Float16 Native __attribute__((vector_size(32)));
  return __builtin_convertvector((Native)h, VecF);
#endif
}

inline Half16 narrow(VecF v, int dtype) {
  if (dtype == kBFloat16) {  // round to nearest, ties to even; keeps NaN
#if defined(__AVX512BF16__)  // one instruction, to which numbers below 1.2e-38 are 0
    return (Half16)_mm512_cvtneps_pbh((__m512)v);
#else
    Word16 word;
    std::memcpy(&word, &v, sizeof word);
    Word16 rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
    rounded = v != v ? (word >> 16) | 0x40 : rounded;
    return __builtin_convertvector(rounded, Half16);
#endif
  }
#if defined(__AVX512F__)
  return (Half16)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  __m256 a, b;
  std::memcpy(&a, &v, 32);
  std::memcpy(&b, reinterpret_cast<const char*>(&v) + 32, 32);
  const __m128i low = _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT);
  const __m128i high = _mm256_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT);
  Half16 h;
  std::memcpy(&h, &low, 16);
  std::memcpy(reinterpret_cast<char*>(&h) + 16, &high, 16);
  return h;
#else
  typedef _Float16 Native __attribute__((vector_size(32)));
  return (Half16) __builtin_convertvector(v, Native);
#endif
}

// As load, store and stream above, of bfloat16; an address to which is streamed is 32-byte-aligned.
template <class A> inline Vec<A> load(const BFloat16* p) {
  Half16 h;
  std::memcpy(&h, p, sizeof h);
  return widen(h, kBFloat16);
}
template <class A> inline void store(BFloat16* p, Vec<A> v) {
  const Half16 h = narrow(v, kBFloat16);
  std::memcpy(p, &h, sizeof h);
}
template <class A> inline void stream(BFloat16* p, Vec<A> v) {
#if defined(__AVX__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)narrow(v, kBFloat16));
#else
  store<A>(p, v);
#endif
}

// A copy of less than 64 bytes, without a call to memcpy.
inline void copy_short(char* to, const char* from, int64_t bytes) {
#pragma GCC unroll 5
  for (int64_t piece = 32; piece >= 2; piece /= 2)
    if (bytes & piece) {
      std::memcpy(to, from, piece);
      to += piece;
      from += piece;
    }
}

// Reads or writes count <= lanes values in memory of any storage type; the other lanes read as zero.
template <class V> inline V read_raw(const char* p, int64_t bytes) {
  V v{};
  if (bytes == sizeof v) std::memcpy(&v, p, sizeof v);
  else copy_short(reinterpret_cast<char*>(&v), p, bytes);
  return v;
}
template <class V> inline void write_raw(char* p, V v, int64_t bytes) {
  if (bytes == sizeof v) std::memcpy(p, &v, sizeof v);
  else copy_short(p, reinterpret_cast<const char*>(&v), bytes);
}
template <class A> inline Vec<A> read(const char* p, int dtype, int64_t count) {
  if constexpr (sizeof(A) == 4)
    if (dtype != kFloat32) return widen(read_raw<Half16>(p, count * 2), dtype);
  return read_raw<Vec<A>>(p, count * sizeof(A));
}
template <class A> inline void write(char* p, Vec<A> v, int dtype, int64_t count) {
  if constexpr (sizeof(A) == 4)
    if (dtype != kFloat32) return write_raw<Half16>(p, narrow(v, dtype), count * 2);
  write_raw<Vec<A>>(p, v, count * sizeof(A));
}

// In-place transpose of lanes x lanes values, by recursively exchanging off-diagonal blocks.
template <int kStep> inline void exchange(VecF* v) {
  constexpr int k = kStep;
  IntF first, second;
  for (int lane = 0; lane < 16; ++lane) {
    first[lane] = (lane & k) ? 16 + lane - k : lane;
    second[lane] = (lane & k) ? 16 + lane : lane + k;
  }
#pragma GCC unroll 16
  for (int row = 0; row < 16; ++row) {
    if (row & k) continue;
    const VecF a = v[row], b = v[row + k];
    v[row] = __builtin_shuffle(a, b, first);
    v[row + k] = __builtin_shuffle(a, b, second);
  }
}
inline void transpose(VecF* v) {
  exchange<8>(v);
  exchange<4>(v);
  exchange<2>(v);
  exchange<1>(v);
}
inline void transpose(VecD* v) {
  for (int i = 0; i < 8; ++i)
    for (int j = 0; j < i; ++j) {
      const double a = v[i][j];
      v[i][j] = v[j][i];
      v[j][i] = a;
    }
}

}  // namespace
