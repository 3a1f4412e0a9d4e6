// LIP pooling and its gradient on CPUs: one pass over the inputs each, stable for any finite logits, deterministic.
//
//   forward    y_p = r_p sum_q e_pq x_q,  e_pq = exp(l_q - m_p),  m_p = max_q l_q,  r_p = 1 / sum_q e_pq
//   backward   dx_q = sum_p e_pq r_p dy_p,  dl_q = sum_p e_pq r_p dy_p (x_q - y_p)   (p: the windows that contain q)
//
// m_p is recomputed in the backward pass, so that only r is saved: a saved log-sum-exp would lose log(1 / r) to
// rounding where m_p is large. The backward pass gathers (each input position sums over its windows), so every result
// is written once, by one thread, in a fixed order. Where the logits are small enough, it uses
// e_pq = exp(l_q) exp(-m_p): one exponential per input position and one per window instead of one per pair.
//
// Both layouts and all storage types run the same inner loops, over the rows of rows.h. The C interface needs none of
// PyTorch's headers, so the library builds in seconds.

#include "rows.h"

namespace {

// ---- the sums ------------------------------------------------------------------------------------------------------

constexpr int64_t kMaxWindow = 64;  // positions in a window: up to 8x8

struct Window {
  int64_t kernel, stride, padding;
};
inline int64_t ceil_div(int64_t a, int64_t b) { return a > 0 ? (a + b - 1) / b : 0; }

// In all functions S is the type of the rows (float, double or BFloat16) and A that of the sums.

// One output position: kTaps pointers to logits and features (0: `taps` of them), all channels. Of a 3x3 window at
// stride 2 only the last 2x2 positions have not been read before, so only they are prefetched.
template <int kTaps, class S, class A>
inline void pool(const S* const* l, const S* const* x, int taps, int64_t depth, S* y, A* r) {
  constexpr int64_t n = lanes<A>();
  const int count = kTaps ? kTaps : taps;
  for (int64_t c = 0; c < depth; c += n) {
    if (kTaps == 9)
      for (const int t : {4, 5, 7, 8}) {
        prefetch(l[t] + c);
        prefetch(x[t] + c);
      }
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

template <class S, class A>
void forward_row(const S* const* l, const S* const* x, int rows, const Window& window, int64_t width, int64_t out_width,
                 int64_t depth, S* y, A* r) {
  const S *lt[kMaxWindow], *xt[kMaxWindow];
  for (int64_t o = 0; o < out_width; ++o) {
    const int64_t first = o * window.stride - window.padding;
    const int64_t begin = max(first, 0), end = min(first + window.kernel, width);
    int taps = 0;
    for (int row = 0; row < rows; ++row)
      for (int64_t j = begin; j < end; ++j, ++taps) {
        lt[taps] = l[row] + j * depth;
        xt[taps] = x[row] + j * depth;
      }
    S* yo = y + o * depth;
    A* ro = r + o * depth;
    if (taps == 9) pool<9>(lt, xt, taps, depth, yo, ro);
    else if (taps == 4) pool<4>(lt, xt, taps, depth, yo, ro);
    else pool<0>(lt, xt, taps, depth, yo, ro);
  }
}

// Whether |l| <= kBound for all logits of a row, so that exp(l), exp(-l) and their products with features are far from
// float32's limits. NaN counts as bounded: r makes the gradients of its windows NaN in either case.
constexpr int kBound = 30;
template <class S> bool is_bounded(const S* l, int64_t count) {
  typedef Sum<S> A;
  constexpr int64_t n = lanes<A>();
  Vec<A> most = splat<A>(0), least = splat<A>(0);
  for (int64_t c = 0; c < count; c += n) {
    prefetch(l + c);
    const Vec<A> value = load<A>(l + c);
    most = larger(value, most);
    least = larger(-value, least);
  }
  bool bounded = true;
  for (int64_t lane = 0; lane < n; ++lane) bounded = bounded && most[lane] <= kBound && least[lane] <= kBound;
  return bounded;
}

// What the backward pass needs of one output row: m, u = r dy and v = u y, interleaved by vectors. Where the logits are
// bounded, m is stored as 0 and u and v include exp(-m): exp(l) is then the same for all windows of a position.
template <class S, class A>
void prepare_row(const S* const* l, int rows, const Window& window, int64_t width, int64_t out_width, int64_t depth,
                 const A* r, const S* y, const S* dy, bool bounded, A* out) {
  constexpr int64_t n = lanes<A>();
  const S* lt[kMaxWindow];
  for (int64_t o = 0; o < out_width; ++o) {
    const int64_t first = o * window.stride - window.padding;
    const int64_t begin = max(first, 0), end = min(first + window.kernel, width);
    int taps = 0;
    for (int row = 0; row < rows; ++row)
      for (int64_t j = begin; j < end; ++j) lt[taps++] = l[row] + j * depth;
    for (int64_t c = 0; c < depth; c += n) {
      Vec<A> top = load<A>(lt[0] + c);
      for (int t = 1; t < taps; ++t) top = larger(load<A>(lt[t] + c), top);
      prefetch(r + o * depth + c);
      for (const S* row : {y, dy}) prefetch(row + o * depth + c);
      Vec<A> u = load<A>(r + o * depth + c) * load<A>(dy + o * depth + c);
      if (bounded) {
        u *= exp_within<A>(-top);
        top = splat<A>(0);
      }
      A* p = out + o * 3 * depth + 3 * c;
      store<A>(p, top);
      store<A>(p + n, u);
      store<A>(p + 2 * n, u * load<A>(y + o * depth + c));
    }
  }
}

// One input row: its logits and features, and where their gradients are written.
template <class S> struct InputRow {
  const S *l, *x;
  S *dx, *dl;
  bool streams;
};

// The gradients of one input position, `at` values into its row: the sum over the `taps` windows that contain it.
template <int kTaps, bool kBounded, class S, class A>
inline void gather(const A* const* prepared, int taps, int64_t depth, const InputRow<S>& row, int64_t at) {
  constexpr int64_t n = lanes<A>();
  const int count = kTaps ? kTaps : taps;
  for (int64_t c = 0; c < depth; c += n) {
    const int64_t here = at + c;
    prefetch(row.x + here);
    const Vec<A> logit = load<A>(row.l + here);
    Vec<A> a{}, b{};
#pragma GCC unroll 4
    for (int t = 0; t < count; ++t) {
      const A* p = prepared[t] + 3 * c;
      const Vec<A> e = kBounded ? splat<A>(1) : exp_nonpositive<A>(logit - load<A>(p));
      a += e * load<A>(p + n);
      b += e * load<A>(p + 2 * n);
    }
    const Vec<A> e = kBounded ? exp_within<A>(logit) : splat<A>(1);
    const Vec<A> dx = e * a, dl = e * (load<A>(row.x + here) * a - b);
    if (row.streams) {
      stream<A>(row.dx + here, dx);
      stream<A>(row.dl + here, dl);
    } else {
      store<A>(row.dx + here, dx);
      store<A>(row.dl + here, dl);
    }
  }
}

template <bool kBounded, class S, class A>
void backward_row(const A* const* prepared, int rows, const Window& window, int64_t width, int64_t out_width,
                  int64_t depth, const InputRow<S>& row) {
  const A* pt[kMaxWindow];
  for (int64_t j = 0; j < width; ++j) {
    const int64_t begin = ceil_div(j + window.padding - window.kernel + 1, window.stride);
    const int64_t end = min((j + window.padding) / window.stride, out_width - 1);
    int taps = 0;
    for (int r = 0; r < rows; ++r)
      for (int64_t o = begin; o <= end; ++o) pt[taps++] = prepared[r] + o * 3 * depth;
    if (taps == 4) gather<4, kBounded>(pt, taps, depth, row, j * depth);
    else if (taps == 2) gather<2, kBounded>(pt, taps, depth, row, j * depth);
    else if (taps == 1) gather<1, kBounded>(pt, taps, depth, row, j * depth);
    else gather<0, kBounded>(pt, taps, depth, row, j * depth);
  }
}

// ---- threads: groups of planes or images, each split into chunks of rows --------------------------------------------

inline int64_t chunk_count(int64_t groups, int64_t rows, int threads) {
  const int64_t wanted = threads > 1 && groups > 0 ? (4 * threads + groups - 1) / groups : 1;
  return max(min(wanted, rows / 4), 1);
}

template <class S>
void forward(const Grid& x, const Grid& l, const Grid& y, const Grid& r, const Window& window, int threads) {
  typedef Sum<S> A;
  constexpr int64_t n = lanes<A>();
  const int64_t depth = x.depth(n), groups = x.groups(n), chunks = chunk_count(groups, y.height, threads);
#pragma omp parallel num_threads(threads)
  {
    Rows<S> xs(x, window.kernel), ls(l, window.kernel);
    OutRows<S> ys(y);
    OutRows<Sum<S>> rs(r);
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
        const S *lr[kMaxWindow], *xr[kMaxWindow];
        int rows = 0;
        for (int64_t i = max(first, 0); i < min(first + window.kernel, x.height); ++i, ++rows) {
          lr[rows] = ls.row(i);
          xr[rows] = xs.row(i);
        }
        forward_row(lr, xr, rows, window, x.width, y.width, depth, ys.next(), rs.next());
      }
      ys.finish();
      rs.finish();
    }
  }
}

template <class S>
void backward(const Grid& dy, const Grid& x, const Grid& l, const Grid& y, const Grid& r, const Grid& dx,
              const Grid& dl, const Window& window, int threads) {
  typedef Sum<S> A;
  constexpr int64_t n = lanes<A>();
  const int64_t depth = x.depth(n), groups = x.groups(n), chunks = chunk_count(groups, x.height, threads);
  const int64_t slots = (window.kernel - 1) / window.stride + 1;  // output rows whose windows contain one input row
  const int64_t prepared_size = y.width * depth * 3;
#pragma omp parallel num_threads(threads)
  {
    Rows<S> xs(x, 1), ls(l, 2 * window.kernel - 1), ys(y, 1), dys(dy, 1);
    Rows<A> rs(r, 1);
    OutRows<S> dxs(dx), dls(dl);
    Buffer<A> prepared = buffer<A>(slots * prepared_size);
    Buffer<int64_t> slot_row = buffer<int64_t>(slots);       // the output row prepared in each slot
    Buffer<bool> slot_bounded = buffer<bool>(slots);         // whether all logits of its windows are bounded
    Buffer<bool> row_bounded = buffer<bool>(window.kernel);  // the same for each of the last input rows
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < groups * chunks; ++task) {
      const int64_t group = task / chunks, chunk = task % chunks;
      xs.start(group);
      ls.start(group);
      ys.start(group);
      rs.start(group);
      dys.start(group);
      for (int64_t k = 0; k < slots; ++k) slot_row.get()[k] = -1;
      const int64_t start = x.height * chunk / chunks;
      dxs.start(group, start);
      dls.start(group, start);
      int64_t checked = 0;  // input rows before this one have their row_bounded
      for (int64_t i = start; i < x.height * (chunk + 1) / chunks; ++i) {
        const int64_t begin = ceil_div(i + window.padding - window.kernel + 1, window.stride);
        const int64_t end = min((i + window.padding) / window.stride, y.height - 1);
        const A* pr[kMaxWindow];
        int rows = 0;
        bool all_bounded = true;
        for (int64_t o = begin; o <= end; ++o) {
          A* out = prepared.get() + o % slots * prepared_size;
          if (slot_row.get()[o % slots] != o) {
            const int64_t first = o * window.stride - window.padding;
            const S* lr[kMaxWindow];
            int count = 0;
            bool window_bounded = true;
            for (int64_t q = max(first, 0); q < min(first + window.kernel, x.height); ++q) {
              lr[count] = ls.row(q);
              if (q >= checked) {
                row_bounded.get()[q % window.kernel] = is_bounded(lr[count], x.width * depth);
                checked = q + 1;
              }
              window_bounded = window_bounded && row_bounded.get()[q % window.kernel];
              ++count;
            }
            prepare_row(lr, count, window, x.width, y.width, depth, rs.row(o), ys.row(o), dys.row(o), window_bounded,
                        out);
            slot_row.get()[o % slots] = o;
            slot_bounded.get()[o % slots] = window_bounded;
          }
          all_bounded = all_bounded && slot_bounded.get()[o % slots];
          pr[rows++] = out;
        }
        const InputRow<S> row = {ls.row(i), xs.row(i), dxs.next(), dls.next(), dxs.streams() && dls.streams()};
        const auto gather_row = all_bounded ? backward_row<true, S, A> : backward_row<false, S, A>;
        gather_row(pr, rows, window, x.width, y.width, depth, row);
      }
      dxs.finish();
      dls.finish();
    }
    finish_streams();
  }
}

}  // namespace

// shape: batch, channels, height, width, out height, out width, kernel, stride, padding, channels-last (0 or 1).
// dtypes: of x (also y, dy, dx), of the logits (also their gradient), of the sums (also r); see DType.
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
  // Whether features and logits are stored as S and used in place.
  template <class S> bool in_place() const {
    return ::in_place<S>(input(nullptr, dtype)) && logits_dtype == dtype;
  }
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
  const auto run = c.sum_dtype == kFloat64    ? forward<double>
                   : c.in_place<BFloat16>() ? forward<BFloat16>
                                            : forward<float>;
  run(c.input(x, c.dtype), c.input(logits, c.logits_dtype), c.output(y, c.dtype), c.output(r, c.sum_dtype), c.window,
      threads);
}

extern "C" void lip2d_backward(const void* dy, const void* x, const void* logits, const void* y, const void* r,
                               void* dx, void* dlogits, const int64_t* shape, const int* dtypes, int threads) {
  const Call c(shape, dtypes);
  const auto run = c.sum_dtype == kFloat64    ? backward<double>
                   : c.in_place<BFloat16>() ? backward<BFloat16>
                                            : backward<float>;
  run(c.output(dy, c.dtype), c.input(x, c.dtype), c.input(logits, c.logits_dtype), c.output(y, c.dtype),
      c.output(r, c.sum_dtype), c.input(dx, c.dtype), c.input(dlogits, c.logits_dtype), c.window, threads);
}
