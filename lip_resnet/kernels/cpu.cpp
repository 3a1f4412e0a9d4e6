// LIP pooling and its gradient on CPUs: one pass over the inputs each, stable for any finite logits, deterministic.
//
//   forward    y_p = r_p sum_q e_pq x_q,  e_pq = exp(l_q - m_p),  m_p = max_q l_q,  r_p = 1 / sum_q e_pq
//   backward   dx_q = sum_p e_pq r_p dy_p,  dl_q = sum_p e_pq r_p dy_p (x_q - y_p)      (p: the windows that hold q)
//
// m_p is recomputed in the backward pass, so that r alone is kept: the usual log-sum-exp loses log(1 / r) to rounding
// where m_p is large. The backward pass gathers (each input position collects from its windows), so every result
// is written once, by one thread, in one order.
//
// Both layouts run the same inner loops, over rows of positions whose channels lie side by side. Channels-last rows are
// used where they are; for contiguous tensors 16 planes at a time are transposed, a row at a time, into a buffer that
// stays in the cache. The same buffer converts bfloat16 and float16. Vectors are the compilers' own (GCC, Clang), so the
// source holds for every CPU. Plain C interface: it builds in seconds, without PyTorch's headers.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#if defined(__AVX512F__) || defined(__F16C__)
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

template <class A> inline Vec<A> load(const A* p) {
  Vec<A> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class A> inline void store(A* p, Vec<A> v) { std::memcpy(p, &v, sizeof v); }
template <class A> inline Vec<A> splat(A a) { return Vec<A>{} + a; }

#if defined(__AVX512F__)
inline VecF larger(VecF a, VecF b) { return (VecF)_mm512_max_ps((__m512)a, (__m512)b); }
inline VecD larger(VecD a, VecD b) { return (VecD)_mm512_max_pd((__m512d)a, (__m512d)b); }
#else
template <class V> inline V larger(V a, V b) { return a > b ? a : b; }  // b where one is NaN
#endif

// exp(d) for d <= 0, NaN for NaN: 2^n by the bits of a float, times exp(d - n log 2) by its Taylor series, |.| at most
// log(2) / 2: the first term left out is below the rounding error. Below kLowest the result stays at exp(kLowest), 1e-38
// or less beside the window's maximum, which is 1.
template <class A> inline Vec<A> exp_nonpositive(Vec<A> d) {
  typedef Traits<A> T;
  constexpr int order = sizeof(T::kSeries) / sizeof(A) - 1;
  d = larger(splat<A>(T::kLowest), d);
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

// ---- storage types <-> vectors ---------------------------------------------------------------------------------------

inline int64_t lowest(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t highest(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t width_of(int dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

inline VecF widen(Half16 h, int dtype) {
  if (dtype == kBFloat16) {
    const Word16 word = __builtin_convertvector(h, Word16) << 16;
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
  if (dtype == kBFloat16) {  // round to nearest, ties to even; a NaN stays one
    Word16 word;
    std::memcpy(&word, &v, sizeof word);
    Word16 rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
    rounded = v != v ? (word >> 16) | 0x40 : rounded;
    return __builtin_convertvector(rounded, Half16);
  }
#if defined(__AVX512F__)
  return (Half16)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  __m256 a, b;
  std::memcpy(&a, &v, 32);
  std::memcpy(&b, reinterpret_cast<const char*>(&v) + 32, 32);
  const __m128i low = _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT), high = _mm256_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT);
  Half16 h;
  std::memcpy(&h, &low, 16);
  std::memcpy(reinterpret_cast<char*>(&h) + 16, &high, 16);
  return h;
#else
  typedef _Float16 Native __attribute__((vector_size(32)));
  return (Half16) __builtin_convertvector(v, Native);
#endif
}

// A copy of less than 64 bytes, without a call.
inline void copy_short(char* to, const char* from, int64_t bytes) {
#pragma GCC unroll 5
  for (int64_t piece = 32; piece >= 2; piece /= 2)
    if (bytes & piece) {
      std::memcpy(to, from, piece);
      to += piece;
      from += piece;
    }
}

// count <= lanes values from or to memory of any type; the other lanes are zero.
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

// In place transpose of lanes x lanes values, by exchanging blocks of half the size, again and again.
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

// ---- rows ----------------------------------------------------------------------------------------------------------

// One tensor seen as groups of rows: an image (channels-last) or 16 planes (contiguous; 8 in double precision).
struct Grid {
  char* data;
  int dtype;
  bool channels_last;
  int64_t planes;   // batch * channels
  int64_t channels, height, width;

  int64_t groups(int64_t lane_count) const {
    return channels_last ? planes / channels : (planes + lane_count - 1) / lane_count;
  }
  // values side by side at one position of a row, rounded up to whole vectors
  int64_t depth(int64_t lane_count) const {
    return channels_last ? (channels + lane_count - 1) / lane_count * lane_count : lane_count;
  }
  char* at(int64_t position) const { return data + position * width_of(dtype); }
};

template <class A> bool in_place(const Grid& grid) {
  return grid.channels_last && grid.channels % lanes<A>() == 0 &&
         grid.dtype == (sizeof(A) == 8 ? kFloat64 : kFloat32);
}
template <class A> A* row_in_place(const Grid& grid, int64_t group, int64_t row) {
  return reinterpret_cast<A*>(grid.at((group * grid.height + row) * grid.width * grid.channels));
}

// Rows [begin, end) of a group, as depth values of A a position. The rows of a plane lie behind one another in memory.
template <class A> void load_rows(const Grid& grid, int64_t group, int64_t begin, int64_t end, A* out) {
  constexpr int64_t n = lanes<A>();
  const int64_t first = begin * grid.width, count = (end - begin) * grid.width;
  if (grid.channels_last) {
    const int64_t depth = grid.depth(n), start = group * grid.height * grid.width + first;
    for (int64_t j = 0; j < count; ++j)
      for (int64_t c = 0; c < depth; c += n)
        store<A>(out + j * depth + c,
                 read<A>(grid.at((start + j) * grid.channels + c), grid.dtype, lowest(grid.channels - c, n)));
    return;
  }
  const int64_t area = grid.height * grid.width;
  for (int64_t j = 0; j < count; j += n) {
    const int64_t some = lowest(count - j, n);
    Vec<A> block[n];
    for (int64_t lane = 0; lane < n; ++lane) {
      const int64_t plane = lowest(group * n + lane, grid.planes - 1);  // past the end: the last one again
      const char* from = grid.at(plane * area + first + j);
      __builtin_prefetch(from + count * width_of(grid.dtype));
      block[lane] = read<A>(from, grid.dtype, some);
    }
    transpose(block);
    for (int64_t lane = 0; lane < some; ++lane) store<A>(out + (j + lane) * n, block[lane]);
  }
}

template <class A> void store_rows(const Grid& grid, int64_t group, int64_t begin, int64_t end, const A* in) {
  constexpr int64_t n = lanes<A>();
  const int64_t first = begin * grid.width, count = (end - begin) * grid.width;
  if (grid.channels_last) {
    const int64_t depth = grid.depth(n), start = group * grid.height * grid.width + first;
    for (int64_t j = 0; j < count; ++j)
      for (int64_t c = 0; c < depth; c += n)
        write<A>(grid.at((start + j) * grid.channels + c), load<A>(in + j * depth + c), grid.dtype,
                 lowest(grid.channels - c, n));
    return;
  }
  const int64_t area = grid.height * grid.width, planes = lowest(grid.planes - group * n, n);
  for (int64_t j = 0; j < count; j += n) {
    const int64_t some = lowest(count - j, n);
    Vec<A> block[n];
    for (int64_t lane = 0; lane < n; ++lane) block[lane] = lane < some ? load<A>(in + (j + lane) * n) : Vec<A>{};
    transpose(block);
    for (int64_t lane = 0; lane < planes; ++lane)
      write<A>(grid.at((group * n + lane) * area + first + j), block[lane], grid.dtype, some);
  }
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class A> using Buffer = std::unique_ptr<A, Free>;
template <class A> Buffer<A> buffer(int64_t count) {
  void* p = nullptr;
  if (posix_memalign(&p, 64, (count > 0 ? count : 1) * sizeof(A))) throw std::bad_alloc();
  return Buffer<A>(static_cast<A*>(p));
}

// How many rows are converted at once: long runs of every plane, for the sake of the memory.
template <class A> int64_t batch_of(const Grid& grid) {
  return grid.channels_last ? 1 : lowest(highest(256 / highest(grid.width, 1), 1), highest(grid.height, 1));
}

// The rows of a tensor as rows of A: the last `kept` that were asked for stay valid.
template <class A> class Rows {
 public:
  Rows(const Grid& grid, int64_t kept)
      : grid_(grid), batch_(batch_of<A>(grid)), slots_((kept + batch_ - 2) / batch_ + 1),
        row_size_(grid.width * grid.depth(lanes<A>())), direct_(in_place<A>(grid)) {
    if (direct_) return;
    values_ = buffer<A>(slots_ * batch_ * row_size_);
    held_ = buffer<int64_t>(slots_);
  }
  void start(int64_t group) {
    group_ = group;
    if (!direct_)
      for (int64_t slot = 0; slot < slots_; ++slot) held_.get()[slot] = -1;
  }
  const A* row(int64_t i) {
    if (direct_) return row_in_place<A>(grid_, group_, i);
    const int64_t batch = i / batch_, slot = batch % slots_;
    A* values = values_.get() + slot * batch_ * row_size_;
    if (held_.get()[slot] != batch) {
      load_rows<A>(grid_, group_, batch * batch_, lowest((batch + 1) * batch_, grid_.height), values);
      held_.get()[slot] = batch;
    }
    return values + i % batch_ * row_size_;
  }

 private:
  Grid grid_;
  int64_t batch_, slots_, row_size_, group_ = 0;
  bool direct_;
  Buffer<A> values_;
  Buffer<int64_t> held_;
};

// Rows that are written, one after another: in place, or through a buffer that is converted when full.
template <class A> class OutRows {
 public:
  explicit OutRows(const Grid& grid)
      : grid_(grid), batch_(batch_of<A>(grid)), row_size_(grid.width * grid.depth(lanes<A>())),
        direct_(in_place<A>(grid)) {
    if (!direct_) values_ = buffer<A>(batch_ * row_size_);
  }
  void start(int64_t group, int64_t row) {
    group_ = group;
    begin_ = end_ = row;
  }
  A* next() {
    if (direct_) return row_in_place<A>(grid_, group_, end_++);
    if (end_ - begin_ == batch_) finish();
    return values_.get() + (end_++ - begin_) * row_size_;
  }
  void finish() {
    if (!direct_ && end_ > begin_) store_rows<A>(grid_, group_, begin_, end_, values_.get());
    begin_ = end_;
  }

 private:
  Grid grid_;
  int64_t batch_, row_size_, group_ = 0, begin_ = 0, end_ = 0;
  bool direct_;
  Buffer<A> values_;
};

// ---- the sums ------------------------------------------------------------------------------------------------------

constexpr int64_t kMaxWindow = 64;  // positions in a window: up to 8x8

struct Window {
  int64_t kernel, stride, padding;
};
inline int64_t ceil_div(int64_t a, int64_t b) { return a > 0 ? (a + b - 1) / b : 0; }

// One output position: kTaps pointers to logits and features (0: `taps` of them), all channels.
template <class A, int kTaps>
inline void pool(const A* const* l, const A* const* x, int taps, int64_t depth, A* y, A* r) {
  constexpr int64_t n = lanes<A>();
  const int count = kTaps ? kTaps : taps;
  for (int64_t c = 0; c < depth; c += n) {
    Vec<A> top = load<A>(l[0] + c);
#pragma GCC unroll 9
    for (int t = 1; t < count; ++t) {
      top = larger(load<A>(l[t] + c), top);
    }
    Vec<A> weights{}, sum{};
#pragma GCC unroll 9
    for (int t = 0; t < count; ++t) {
      const Vec<A> e = exp_nonpositive<A>(load<A>(l[t] + c) - top);
      weights += e;
      sum += e * load<A>(x[t] + c);
    }
    const Vec<A> inverse = splat<A>(1) / weights;
    store<A>(y + c, sum * inverse);
    store<A>(r + c, inverse);
  }
}

template <class A>
void forward_row(const A* const* l, const A* const* x, int rows, const Window& window, int64_t width, int64_t out_width,
                 int64_t depth, A* y, A* r) {
  const A *lt[kMaxWindow], *xt[kMaxWindow];
  for (int64_t o = 0; o < out_width; ++o) {
    const int64_t first = o * window.stride - window.padding;
    const int64_t begin = highest(first, 0), end = lowest(first + window.kernel, width);
    int taps = 0;
    for (int row = 0; row < rows; ++row)
      for (int64_t j = begin; j < end; ++j, ++taps) {
        lt[taps] = l[row] + j * depth;
        xt[taps] = x[row] + j * depth;
      }
    A *yo = y + o * depth, *ro = r + o * depth;
    if (taps == 9) pool<A, 9>(lt, xt, taps, depth, yo, ro);
    else if (taps == 4) pool<A, 4>(lt, xt, taps, depth, yo, ro);
    else pool<A, 0>(lt, xt, taps, depth, yo, ro);
  }
}

// What the backward pass needs of one output row: m, u = r dy and v = u y, side by side.
template <class A>
void prepare_row(const A* const* l, int rows, const Window& window, int64_t width, int64_t out_width, int64_t depth,
                 const A* r, const A* y, const A* dy, A* out) {
  constexpr int64_t n = lanes<A>();
  const A* lt[kMaxWindow];
  for (int64_t o = 0; o < out_width; ++o) {
    const int64_t first = o * window.stride - window.padding;
    const int64_t begin = highest(first, 0), end = lowest(first + window.kernel, width);
    int taps = 0;
    for (int row = 0; row < rows; ++row)
      for (int64_t j = begin; j < end; ++j) lt[taps++] = l[row] + j * depth;
    for (int64_t c = 0; c < depth; c += n) {
      Vec<A> top = load<A>(lt[0] + c);
      for (int t = 1; t < taps; ++t) top = larger(load<A>(lt[t] + c), top);
      const Vec<A> u = load<A>(r + o * depth + c) * load<A>(dy + o * depth + c);
      A* p = out + o * 3 * depth + 3 * c;
      store<A>(p, top);
      store<A>(p + n, u);
      store<A>(p + 2 * n, u * load<A>(y + o * depth + c));
    }
  }
}

// One input position: gathers from the `taps` windows that hold it.
template <class A, int kTaps>
inline void gather(const A* const* prepared, int taps, int64_t depth, const A* l, const A* x, A* dx, A* dl) {
  constexpr int64_t n = lanes<A>();
  const int count = kTaps ? kTaps : taps;
  for (int64_t c = 0; c < depth; c += n) {
    const Vec<A> logit = load<A>(l + c);
    Vec<A> a{}, b{};
#pragma GCC unroll 4
    for (int t = 0; t < count; ++t) {
      const A* p = prepared[t] + 3 * c;
      const Vec<A> e = exp_nonpositive<A>(logit - load<A>(p));
      a += e * load<A>(p + n);
      b += e * load<A>(p + 2 * n);
    }
    store<A>(dx + c, a);
    store<A>(dl + c, load<A>(x + c) * a - b);
  }
}

template <class A>
void backward_row(const A* const* prepared, int rows, const Window& window, int64_t width, int64_t out_width,
                  int64_t depth, const A* l, const A* x, A* dx, A* dl) {
  const A* pt[kMaxWindow];
  for (int64_t j = 0; j < width; ++j) {
    const int64_t begin = ceil_div(j + window.padding - window.kernel + 1, window.stride);
    const int64_t end = lowest((j + window.padding) / window.stride, out_width - 1);
    int taps = 0;
    for (int row = 0; row < rows; ++row)
      for (int64_t o = begin; o <= end; ++o) pt[taps++] = prepared[row] + o * 3 * depth;
    const int64_t at = j * depth;
    if (taps == 4) gather<A, 4>(pt, taps, depth, l + at, x + at, dx + at, dl + at);
    else if (taps == 2) gather<A, 2>(pt, taps, depth, l + at, x + at, dx + at, dl + at);
    else if (taps == 1) gather<A, 1>(pt, taps, depth, l + at, x + at, dx + at, dl + at);
    else gather<A, 0>(pt, taps, depth, l + at, x + at, dx + at, dl + at);
  }
}

// ---- threads: groups, each cut into chunks of rows -------------------------------------------------------------------

inline int64_t chunk_count(int64_t groups, int64_t rows, int threads) {
  const int64_t wanted = threads > 1 && groups > 0 ? (4 * threads + groups - 1) / groups : 1;
  return highest(lowest(wanted, rows / 4), 1);
}

template <class A>
void forward(const Grid& x, const Grid& l, const Grid& y, const Grid& r, const Window& window, int threads) {
  constexpr int64_t n = lanes<A>();
  const int64_t depth = x.depth(n), groups = x.groups(n), chunks = chunk_count(groups, y.height, threads);
#pragma omp parallel num_threads(threads)
  {
    Rows<A> xs(x, window.kernel), ls(l, window.kernel);
    OutRows<A> ys(y), rs(r);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < groups * chunks; ++task) {
      const int64_t group = task / chunks, chunk = task % chunks;
      xs.start(group);
      ls.start(group);
      const int64_t start = y.height * chunk / chunks;
      ys.start(group, start);
      rs.start(group, start);
      for (int64_t o = start; o < y.height * (chunk + 1) / chunks; ++o) {
        const int64_t first = o * window.stride - window.padding;
        const A *lr[kMaxWindow], *xr[kMaxWindow];
        int rows = 0;
        for (int64_t i = highest(first, 0); i < lowest(first + window.kernel, x.height); ++i, ++rows) {
          lr[rows] = ls.row(i);
          xr[rows] = xs.row(i);
        }
        forward_row<A>(lr, xr, rows, window, x.width, y.width, depth, ys.next(), rs.next());
      }
      ys.finish();
      rs.finish();
    }
  }
}

template <class A>
void backward(const Grid& dy, const Grid& x, const Grid& l, const Grid& y, const Grid& r, const Grid& dx, const Grid& dl,
              const Window& window, int threads) {
  constexpr int64_t n = lanes<A>();
  const int64_t depth = x.depth(n), groups = x.groups(n), chunks = chunk_count(groups, x.height, threads);
  const int64_t alive = (window.kernel - 1) / window.stride + 1;  // output rows that hold one input row
  const int64_t prepared_size = y.width * depth * 3;
#pragma omp parallel num_threads(threads)
  {
    Rows<A> xs(x, 1), ls(l, 2 * window.kernel - 1), ys(y, 1), rs(r, 1), dys(dy, 1);
    OutRows<A> dxs(dx), dls(dl);
    Buffer<A> prepared = buffer<A>(alive * prepared_size);
    Buffer<int64_t> held = buffer<int64_t>(alive);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < groups * chunks; ++task) {
      const int64_t group = task / chunks, chunk = task % chunks;
      xs.start(group);
      ls.start(group);
      ys.start(group);
      rs.start(group);
      dys.start(group);
      for (int64_t k = 0; k < alive; ++k) held.get()[k] = -1;
      const int64_t start = x.height * chunk / chunks;
      dxs.start(group, start);
      dls.start(group, start);
      for (int64_t i = start; i < x.height * (chunk + 1) / chunks; ++i) {
        const int64_t begin = ceil_div(i + window.padding - window.kernel + 1, window.stride);
        const int64_t end = lowest((i + window.padding) / window.stride, y.height - 1);
        const A* pr[kMaxWindow];
        int rows = 0;
        for (int64_t o = begin; o <= end; ++o) {
          A* out = prepared.get() + o % alive * prepared_size;
          if (held.get()[o % alive] != o) {
            const int64_t first = o * window.stride - window.padding;
            const A* lr[kMaxWindow];
            int count = 0;
            for (int64_t q = highest(first, 0); q < lowest(first + window.kernel, x.height); ++q) lr[count++] = ls.row(q);
            prepare_row<A>(lr, count, window, x.width, y.width, depth, rs.row(o), ys.row(o), dys.row(o), out);
            held.get()[o % alive] = o;
          }
          pr[rows++] = out;
        }
        backward_row<A>(pr, rows, window, x.width, y.width, depth, ls.row(i), xs.row(i), dxs.next(), dls.next());
      }
      dxs.finish();
      dls.finish();
    }
  }
}

}  // namespace

// shape: batch, channels, height, width, out height, out width, kernel, stride, padding, channels-last (0 or 1).
// dtypes: of x (as y, dy, dx), of the logits (as their gradient), of the sums (as r); see DType.
namespace {
struct Call {
  Window window;
  int64_t planes, channels, height, width, out_height, out_width;
  bool channels_last;
  int dtype, logits_dtype, sum_dtype;
  Call(const int64_t* shape, const int* dtypes)
      : window{shape[6], shape[7], shape[8]}, planes(shape[0] * shape[1]), channels(shape[1]), height(shape[2]),
        width(shape[3]), out_height(shape[4]), out_width(shape[5]), channels_last(shape[9] != 0), dtype(dtypes[0]),
        logits_dtype(dtypes[1]), sum_dtype(dtypes[2]) {}
  Grid input(const void* data, int type) const {
    return {static_cast<char*>(const_cast<void*>(data)), type, channels_last, planes, channels, height, width};
  }
  Grid output(const void* data, int type) const {
    return {static_cast<char*>(const_cast<void*>(data)), type, channels_last, planes, channels, out_height, out_width};
  }
};
}  // namespace

extern "C" void lip2d_forward(const void* x, const void* logits, void* y, void* r, const int64_t* shape,
                              const int* dtypes, int threads) {
  const Call c(shape, dtypes);
  const auto run = c.sum_dtype == kFloat64 ? forward<double> : forward<float>;
  run(c.input(x, c.dtype), c.input(logits, c.logits_dtype), c.output(y, c.dtype), c.output(r, c.sum_dtype), c.window,
      threads);
}

extern "C" void lip2d_backward(const void* dy, const void* x, const void* logits, const void* y, const void* r, void* dx,
                               void* dlogits, const int64_t* shape, const int* dtypes, int threads) {
  const Call c(shape, dtypes);
  const auto run = c.sum_dtype == kFloat64 ? backward<double> : backward<float>;
  run(c.output(dy, c.dtype), c.input(x, c.dtype), c.input(logits, c.logits_dtype), c.output(y, c.dtype),
      c.output(r, c.sum_dtype), c.input(dx, c.dtype), c.input(dlogits, c.logits_dtype), c.window, threads);
}

// ---- instance norm with the activation behind it -------------------------------------------------------------------
//
//   t = (z - mean) rstd weight + bias over the positions of one channel of one image,  out = activation(t)
//
// Forward reads z twice and writes out; backward reads z and dout twice and writes dz. The statistics are sums of
// differences from the first position, in short runs, so that neither a large mean nor a large map costs digits.

namespace {

enum Activation : int { kNone = 0, kReLU = 1, kGate = 2 };

template <class A> inline Vec<A> sigmoid(Vec<A> t) {
  const Vec<A> e = exp_nonpositive<A>(t < 0 ? t : -t);
  const Vec<A> inverse = splat<A>(1) / (e + 1);
  return t < 0 ? e * inverse : inverse;
}
template <class A, int kActivation> inline Vec<A> activate(Vec<A> t, A coefficient) {
  if constexpr (kActivation == kReLU) return larger(splat<A>(0), t);
  else if constexpr (kActivation == kGate) return sigmoid<A>(t) * coefficient;
  else return t;
}
template <class A, int kActivation> inline Vec<A> slope(Vec<A> t, Vec<A> dout, A coefficient) {
  if constexpr (kActivation == kReLU) return t > 0 ? dout : splat<A>(0);
  else if constexpr (kActivation == kGate) {
    const Vec<A> s = sigmoid<A>(t);
    return dout * s * (1 - s) * coefficient;
  } else return dout;
}
template <class A> inline Vec<A> root(Vec<A> v) {
  for (int64_t lane = 0; lane < lanes<A>(); ++lane) v[lane] = __builtin_sqrt(v[lane]);
  return v;
}

constexpr int64_t kRun = 64;  // positions summed before a sum is added to the total

// Channels-last: a task is up to kBlock vectors of channels of one image. All arrays are dense; weight and bias (C).
template <class A> struct Norm {
  const A *z, *weight, *bias, *dout;
  A *out, *mean, *rstd, *sum_g, *sum_gz;  // mean, rstd, sum_g, sum_gz: (B, C)
  int64_t batch, channels, area;
  A eps, coefficient;
};
constexpr int64_t kBlock = 4;

template <class A, int kActivation, bool kBackward> void norm_task(const Norm<A>& a, int64_t image, int64_t c, int64_t vectors) {
  constexpr int64_t n = lanes<A>();
  const int64_t start = image * a.area * a.channels + c, at = image * a.channels + c;
  const A count = static_cast<A>(a.area);
  const A *z = a.z + start, *dout = kBackward ? a.dout + start : nullptr;
  A* out = a.out + start;
  Vec<A> scale[kBlock], shift[kBlock], mean[kBlock], rstd[kBlock], total[kBlock] = {}, square[kBlock] = {};
  for (int64_t v = 0; v < vectors; ++v) {
    mean[v] = kBackward ? load<A>(a.mean + at + v * n) : load<A>(z + v * n);
    rstd[v] = kBackward ? load<A>(a.rstd + at + v * n) : splat<A>(1);
    scale[v] = rstd[v] * load<A>(a.weight + c + v * n);
    shift[v] = load<A>(a.bias + c + v * n) - mean[v] * scale[v];
  }
  for (int64_t first = 0; first < a.area; first += kRun) {
    const int64_t end = lowest(first + kRun, a.area);
    Vec<A> part[kBlock] = {}, part_square[kBlock] = {};
    for (int64_t j = first; j < end; ++j)
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t o = j * a.channels + v * n;
        const Vec<A> value = load<A>(z + o), centred = (value - mean[v]) * rstd[v];
        const Vec<A> g = kBackward ? slope<A, kActivation>(value * scale[v] + shift[v], load<A>(dout + o), a.coefficient)
                                   : centred;
        part[v] += g;
        part_square[v] += g * centred;
      }
    for (int64_t v = 0; v < vectors; ++v) {
      total[v] += part[v];
      square[v] += part_square[v];
    }
  }
  for (int64_t v = 0; v < vectors; ++v) {
    if (kBackward) {
      store<A>(a.sum_g + at + v * n, total[v]);
      store<A>(a.sum_gz + at + v * n, square[v]);
      total[v] /= count;
      square[v] /= count;
    } else {
      const Vec<A> offset = total[v] / count;
      const Vec<A> variance = larger(splat<A>(0), square[v] / count - offset * offset);
      mean[v] += offset;
      rstd[v] = splat<A>(1) / root<A>(variance + a.eps);
      scale[v] = rstd[v] * load<A>(a.weight + c + v * n);
      shift[v] = load<A>(a.bias + c + v * n) - mean[v] * scale[v];
      store<A>(a.mean + at + v * n, mean[v]);
      store<A>(a.rstd + at + v * n, rstd[v]);
    }
  }
  for (int64_t j = 0; j < a.area; ++j)
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t o = j * a.channels + v * n;
      const Vec<A> value = load<A>(z + o), t = value * scale[v] + shift[v];
      if (kBackward) {
        const Vec<A> g = slope<A, kActivation>(t, load<A>(dout + o), a.coefficient);
        store<A>(out + o, scale[v] * (g - total[v] - (value - mean[v]) * rstd[v] * square[v]));
      } else {
        store<A>(out + o, activate<A, kActivation>(t, a.coefficient));
      }
    }
}

template <class A, bool kBackward> void norm(const Norm<A>& a, int activation, int threads) {
  constexpr int64_t n = lanes<A>();
  const int64_t whole = a.channels / n;
  const int64_t block = a.batch * whole / kBlock >= 2 * threads ? kBlock : 1;
  const int64_t blocks = (whole + block - 1) / block;
  const auto task = activation == kGate   ? norm_task<A, kGate, kBackward>
                    : activation == kReLU ? norm_task<A, kReLU, kBackward>
                                          : norm_task<A, kNone, kBackward>;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t index = 0; index < a.batch * blocks; ++index) {
    const int64_t first = index % blocks * block;
    task(a, index / blocks, first * n, lowest(block, whole - first));
  }
}

template <class A>
void norm_call(const void* z, const void* weight, const void* bias, const void* dout, void* out, void* mean, void* rstd,
               void* sum_g, void* sum_gz, const int64_t* shape, double eps, double coefficient, int threads) {
  const Norm<A> a = {static_cast<const A*>(z), static_cast<const A*>(weight), static_cast<const A*>(bias),
                     static_cast<const A*>(dout), static_cast<A*>(out), static_cast<A*>(mean), static_cast<A*>(rstd),
                     static_cast<A*>(sum_g), static_cast<A*>(sum_gz), shape[0], shape[1], shape[2],
                     static_cast<A>(eps), static_cast<A>(coefficient)};
  dout ? norm<A, true>(a, static_cast<int>(shape[3]), threads) : norm<A, false>(a, static_cast<int>(shape[3]), threads);
}

}  // namespace

// shape: batch, channels (a multiple of 16, or of 8 in double precision), positions, activation. All channels-last,
// float32 or float64. Without dout: forward, out = activation(t), and mean and rstd are written. With it: backward,
// out = dz, and the sums over positions of dt and dt (z - mean) rstd are written.
extern "C" void instance_norm(const void* z, const void* weight, const void* bias, const void* dout, void* out,
                              void* mean, void* rstd, void* sum_g, void* sum_gz, const int64_t* shape, double eps,
                              double coefficient, int is_double, int threads) {
  (is_double ? norm_call<double> : norm_call<float>)(z, weight, bias, dout, out, mean, rstd, sum_g, sum_gz, shape, eps,
                                                     coefficient, threads);
}
