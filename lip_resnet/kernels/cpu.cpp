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
// stays in the cache. The same buffer converts bfloat16 and float16. Plain C interface: it
// builds in seconds, without PyTorch's headers.

#include <memory>
#include <new>

#include "vectors.h"

namespace {

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
      // what this lane needs next: the plane's next rows, or behind its end the next group's plane
      __builtin_prefetch(from + (end == grid.height ? n * area : count) * width_of(grid.dtype));
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
