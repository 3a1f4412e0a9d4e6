// Instance norm and the activation after it on CPUs, for channels-last tensors.
//
//   t = (z - mean) rstd weight + bias over the positions of one channel of one image,  out = activation(t)
//
// Forward reads z twice and writes out; backward reads z and dout twice and writes dz. The statistics are sums of
// differences from the first position, in short runs, so that neither a large mean nor a large map costs precision.

#include "vectors.h"

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

// A task is up to kBlock vectors of channels of one image. All arrays are dense; weight and bias (C).
template <class A> struct Norm {
  const A *z, *weight, *bias, *dout;
  A *out, *mean, *rstd, *sum_g, *sum_gz;  // mean, rstd, sum_g, sum_gz: (B, C)
  int64_t batch, channels, area;
  A eps, coefficient;
};
constexpr int64_t kBlock = 4;

template <class A, int kActivation, bool kBackward>
void norm_task(const Norm<A>& a, int64_t image, int64_t c, int64_t vectors) {
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
    const int64_t end = min(first + kRun, a.area);
    Vec<A> part[kBlock] = {}, part_square[kBlock] = {};
    for (int64_t j = first; j < end; ++j)
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t o = j * a.channels + v * n;
        const Vec<A> value = load<A>(z + o), centred = (value - mean[v]) * rstd[v];
        const Vec<A> g =
            kBackward ? slope<A, kActivation>(value * scale[v] + shift[v], load<A>(dout + o), a.coefficient) : centred;
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
    task(a, index / blocks, first * n, min(block, whole - first));
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
// float32 or float64. dout null: forward; writes out = activation(t), mean and rstd. Otherwise backward: writes
// out = dz and the sums over positions of dt (sum_g) and dt (z - mean) rstd (sum_gz).
extern "C" void instance_norm(const void* z, const void* weight, const void* bias, const void* dout, void* out,
                              void* mean, void* rstd, void* sum_g, void* sum_gz, const int64_t* shape, double eps,
                              double coefficient, int is_double, int threads) {
  (is_double ? norm_call<double> : norm_call<float>)(z, weight, bias, dout, out, mean, rstd, sum_g, sum_gz, shape, eps,
                                                     coefficient, threads);
}
