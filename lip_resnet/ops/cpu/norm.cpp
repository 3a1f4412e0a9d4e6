// Instance norm and the activation after it on CPUs, for channels-last tensors.
//
//   t = (z - mean) rstd weight + bias over the positions of one channel of one image,  out = activation(t)
//
// Forward reads z twice and writes out; backward reads z and dout twice and writes dz. The statistics are sums of
// differences from the first position, in short runs, so that neither a large mean nor a large map costs precision.

#include "vectors.h"

namespace {

enum Activation : int { kNone = 0, kReLU = 1, kGate = 2 };

// 1 / (1 + exp(-t)); t is limited to the range of exp_within, where the result is 1 or below 3e-38 anyway.
template <class A> inline Vec<A> sigmoid(Vec<A> t) {
  const Vec<A> lowest = splat<A>(Traits<A>::kLowest);
  return splat<A>(1) / (exp_within<A>(larger(lowest, -larger(lowest, t))) + 1);
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

// All arrays are dense, features channels-last; weight and bias: (C); mean, rstd, sum_g, sum_gz: (B, C).
template <class A> struct Norm {
  const char *z, *dout;
  char* out;
  const A *weight, *bias;
  A *mean, *rstd, *sum_g, *sum_gz;
  int64_t batch, channels, area;
  A eps, coefficient;
};
constexpr int64_t kBlock = 4;

// kVectors vectors of channels of one image, from channel c; the last vector has `count` channels. kType is the storage
// type of z, dout and out.
template <class A, int kType, int kActivation, bool kBackward, int kVectors>
void norm_task(const Norm<A>& a, int64_t image, int64_t c, int64_t count) {
  constexpr int64_t n = lanes<A>(), width = width_of(kType);
  if (kVectors > 1) count = n;  // a constant
  const int64_t start = (image * a.area * a.channels + c) * width, at = image * a.channels + c;
  const int64_t step = a.channels * width, bytes = count * sizeof(A);
  const char *z = a.z + start, *dout = kBackward ? a.dout + start : nullptr;
  char* out = a.out + start;
  const auto load_row = [&](const A* row, int v) {
    return read_raw<Vec<A>>(reinterpret_cast<const char*>(row + v * n), bytes);
  };
  const auto store_row = [&](A* row, int v, Vec<A> value) {
    write_raw(reinterpret_cast<char*>(row + v * n), value, bytes);
  };
  const auto value_at = [&](const char* p, int v) { return read<A>(p + v * n * width, kType, count); };
  Vec<A> scale[kVectors], shift[kVectors], mean[kVectors], rstd[kVectors], total[kVectors] = {}, square[kVectors] = {};
  for (int v = 0; v < kVectors; ++v) {
    mean[v] = kBackward ? load_row(a.mean + at, v) : value_at(z, v);
    rstd[v] = kBackward ? load_row(a.rstd + at, v) : splat<A>(1);
    scale[v] = rstd[v] * load_row(a.weight + c, v);
    shift[v] = load_row(a.bias + c, v) - mean[v] * scale[v];
  }
  for (int64_t first = 0; first < a.area; first += kRun) {
    Vec<A> part[kVectors] = {}, part_square[kVectors] = {};
    for (int64_t j = first; j < min(first + kRun, a.area); ++j)
      for (int v = 0; v < kVectors; ++v) {
        const Vec<A> value = value_at(z + j * step, v), centred = (value - mean[v]) * rstd[v];
        const Vec<A> g = kBackward ? slope<A, kActivation>(value * scale[v] + shift[v], value_at(dout + j * step, v),
                                                           a.coefficient)
                                   : centred;
        part[v] += g;
        part_square[v] += g * centred;
      }
    for (int v = 0; v < kVectors; ++v) {
      total[v] += part[v];
      square[v] += part_square[v];
    }
  }
  const A area = static_cast<A>(a.area);
  for (int v = 0; v < kVectors; ++v) {
    if (kBackward) {
      store_row(a.sum_g + at, v, total[v]);
      store_row(a.sum_gz + at, v, square[v]);
      total[v] /= area;
      square[v] /= area;
    } else {
      const Vec<A> offset = total[v] / area;
      const Vec<A> variance = larger(splat<A>(0), square[v] / area - offset * offset);
      mean[v] += offset;
      rstd[v] = splat<A>(1) / root<A>(variance + a.eps);
      scale[v] = rstd[v] * load_row(a.weight + c, v);
      shift[v] = load_row(a.bias + c, v) - mean[v] * scale[v];
      store_row(a.mean + at, v, mean[v]);
      store_row(a.rstd + at, v, rstd[v]);
    }
  }
  for (int64_t j = 0; j < a.area; ++j)
    for (int v = 0; v < kVectors; ++v) {
      const Vec<A> value = value_at(z + j * step, v), t = value * scale[v] + shift[v];
      Vec<A> result;
      if (kBackward) {
        const Vec<A> g = slope<A, kActivation>(t, value_at(dout + j * step, v), a.coefficient);
        result = scale[v] * (g - total[v] - (value - mean[v]) * rstd[v] * square[v]);
      } else {
        result = activate<A, kActivation>(t, a.coefficient);
      }
      write<A>(out + j * step + v * n * width, result, kType, count);
    }
}

template <class A, int kType, int kActivation, bool kBackward> void norm_as(const Norm<A>& a, int threads) {
  constexpr int64_t n = lanes<A>();
  const int64_t whole = a.channels / n;
  const int64_t blocks = a.batch * whole / kBlock >= 2 * threads ? whole / kBlock : 0;  // else single vectors
  const int64_t rest = (a.channels + n - 1) / n - blocks * kBlock;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t index = 0; index < a.batch * (blocks + rest); ++index) {
    const int64_t image = index / (blocks + rest), task = index % (blocks + rest);
    if (task < blocks) {
      norm_task<A, kType, kActivation, kBackward, kBlock>(a, image, task * kBlock * n, n);
    } else {
      const int64_t c = (blocks * kBlock + task - blocks) * n;
      norm_task<A, kType, kActivation, kBackward, 1>(a, image, c, min(a.channels - c, n));
    }
  }
}

template <class A, int kType>
void norm(const void* z, const void* weight, const void* bias, const void* dout, void* out, void* mean, void* rstd,
          void* sum_g, void* sum_gz, const int64_t* shape, double eps, double coefficient, int threads) {
  const Norm<A> a = {static_cast<const char*>(z), static_cast<const char*>(dout), static_cast<char*>(out),
                     static_cast<const A*>(weight), static_cast<const A*>(bias), static_cast<A*>(mean),
                     static_cast<A*>(rstd), static_cast<A*>(sum_g), static_cast<A*>(sum_gz), shape[0], shape[1],
                     shape[2], static_cast<A>(eps), static_cast<A>(coefficient)};
  const auto run = [&](auto forward, auto backward) { dout ? backward(a, threads) : forward(a, threads); };
  if (shape[3] == kGate) run(norm_as<A, kType, kGate, false>, norm_as<A, kType, kGate, true>);
  else if (shape[3] == kReLU) run(norm_as<A, kType, kReLU, false>, norm_as<A, kType, kReLU, true>);
  else run(norm_as<A, kType, kNone, false>, norm_as<A, kType, kNone, true>);
}

}  // namespace

// shape: batch, channels, positions, activation. z, dout and out are channels-last, of storage type `dtype`; all other
// arrays are double beside float64, else float. dout null: forward; writes out = activation(t), mean and rstd.
// Otherwise backward: writes out = dz and the sums over positions of dt (sum_g) and dt (z - mean) rstd (sum_gz).
extern "C" void instance_norm(const void* z, const void* weight, const void* bias, const void* dout, void* out,
                              void* mean, void* rstd, void* sum_g, void* sum_gz, const int64_t* shape, double eps,
                              double coefficient, int dtype, int threads) {
  const auto run = dtype == kFloat64    ? norm<double, kFloat64>
                   : dtype == kBFloat16 ? norm<float, kBFloat16>
                   : dtype == kFloat16  ? norm<float, kFloat16>
                                        : norm<float, kFloat32>;
  run(z, weight, bias, dout, out, mean, rstd, sum_g, sum_gz, shape, eps, coefficient, threads);
}
