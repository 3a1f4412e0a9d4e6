// Tensors of either layout and any storage type as channels-last rows of float or double.
//
// Channels-last rows of that type, and of bfloat16 where a whole tensor is, are used in place; a contiguous tensor is
// transposed, 16 planes and some rows at a time, into a buffer that stays in the cache. The same buffer serves other
// conversions.

#pragma once

#include <memory>
#include <new>
#include <type_traits>

#include "vectors.h"

namespace {

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
  // values at one position of a row, rounded up to whole vectors
  int64_t depth(int64_t lane_count) const {
    return channels_last ? (channels + lane_count - 1) / lane_count * lane_count : lane_count;
  }
  char* at(int64_t position) const { return data + position * width_of(dtype); }
};

// Whether the rows are used in place, as values of S.
template <class S> bool in_place(const Grid& grid) {
  return grid.channels_last && grid.channels % lanes<Sum<S>>() == 0 && grid.dtype == SumOf<S>::kType;
}
template <class S> S* row_in_place(const Grid& grid, int64_t group, int64_t row) {
  return reinterpret_cast<S*>(grid.at((group * grid.height + row) * grid.width * grid.channels));
}

// Reads rows [begin, end) of a group as depth values of A per position. The rows of a plane are contiguous in memory.
template <class A> void load_rows(const Grid& grid, int64_t group, int64_t begin, int64_t end, A* out) {
  constexpr int64_t n = lanes<A>();
  const int64_t first = begin * grid.width, count = (end - begin) * grid.width;
  if (grid.channels_last) {
    const int64_t depth = grid.depth(n), start = group * grid.height * grid.width + first;
    for (int64_t j = 0; j < count; ++j)
      for (int64_t c = 0; c < depth; c += n)
        store<A>(out + j * depth + c,
                 read<A>(grid.at((start + j) * grid.channels + c), grid.dtype, min(grid.channels - c, n)));
    return;
  }
  const int64_t area = grid.height * grid.width;
  for (int64_t j = 0; j < count; j += n) {
    const int64_t valid = min(count - j, n);
    Vec<A> block[n];
    for (int64_t lane = 0; lane < n; ++lane) {
      const int64_t plane = min(group * n + lane, grid.planes - 1);  // beyond the end: the last plane again
      const char* from = grid.at(plane * area + first + j);
      // prefetch what this lane reads next: the plane's next rows, or after the last ones the next group's plane
      __builtin_prefetch(from + (end == grid.height ? n * area : count) * width_of(grid.dtype));
      block[lane] = read<A>(from, grid.dtype, valid);
    }
    transpose(block);
    for (int64_t lane = 0; lane < valid; ++lane) store<A>(out + (j + lane) * n, block[lane]);
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
                 min(grid.channels - c, n));
    return;
  }
  const int64_t area = grid.height * grid.width, planes = min(grid.planes - group * n, n);
  for (int64_t j = 0; j < count; j += n) {
    const int64_t valid = min(count - j, n);
    Vec<A> block[n];
    for (int64_t lane = 0; lane < n; ++lane) block[lane] = lane < valid ? load<A>(in + (j + lane) * n) : Vec<A>{};
    transpose(block);
    for (int64_t lane = 0; lane < planes; ++lane)
      write<A>(grid.at((group * n + lane) * area + first + j), block[lane], grid.dtype, valid);
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

// How many rows are converted at once: enough for long contiguous reads from every plane.
template <class A> int64_t batch_of(const Grid& grid) {
  return grid.channels_last ? 1 : min(max(256 / max(grid.width, 1), 1), max(grid.height, 1));
}

// Reads a tensor row by row as rows of S; the last `kept` rows returned stay valid. With BFloat16 only in place.
template <class S> class Rows {
  typedef Sum<S> A;

 public:
  Rows(const Grid& grid, int64_t kept)
      : grid_(grid), batch_(batch_of<A>(grid)), slots_((kept + batch_ - 2) / batch_ + 1),
        row_size_(grid.width * grid.depth(lanes<A>())), direct_(in_place<S>(grid)) {
    if (direct_) return;
    values_ = buffer<A>(slots_ * batch_ * row_size_);
    cached_ = buffer<int64_t>(slots_);
  }
  void start(int64_t group) {
    group_ = group;
    if (!direct_)
      for (int64_t slot = 0; slot < slots_; ++slot) cached_.get()[slot] = -1;
  }
  const S* row(int64_t i) {
    if (direct_ || !std::is_same_v<S, A>) return row_in_place<S>(grid_, group_, i);
    const int64_t batch = i / batch_, slot = batch % slots_;
    A* values = values_.get() + slot * batch_ * row_size_;
    if (cached_.get()[slot] != batch) {
      load_rows<A>(grid_, group_, batch * batch_, min((batch + 1) * batch_, grid_.height), values);
      cached_.get()[slot] = batch;
    }
    return reinterpret_cast<const S*>(values + i % batch_ * row_size_);
  }

 private:
  Grid grid_;
  int64_t batch_, slots_, row_size_, group_ = 0;
  bool direct_;
  Buffer<A> values_;
  Buffer<int64_t> cached_;
};

constexpr int64_t kStreamedBytes = 1 << 20;  // about the size of a core's L2 cache

// Writes a tensor row by row: in place, or through a buffer that is converted when full. With BFloat16 only in place.
template <class S> class OutRows {
  typedef Sum<S> A;

 public:
  explicit OutRows(const Grid& grid)
      : grid_(grid), batch_(batch_of<A>(grid)), row_size_(grid.width * grid.depth(lanes<A>())),
        direct_(in_place<S>(grid)) {
    if (!direct_) values_ = buffer<A>(batch_ * row_size_);
  }
  // Whether to use non-temporal stores: a tensor of this size would be evicted before it is read.
  bool streams() const {
    return direct_ && reinterpret_cast<uintptr_t>(grid_.data) % 64 == 0 &&
           grid_.planes * grid_.height * grid_.width * width_of(grid_.dtype) >= kStreamedBytes;
  }
  void start(int64_t group, int64_t row) {
    group_ = group;
    begin_ = end_ = row;
  }
  S* next() {
    if (direct_ || !std::is_same_v<S, A>) return row_in_place<S>(grid_, group_, end_++);
    if (end_ - begin_ == batch_) finish();
    return reinterpret_cast<S*>(values_.get() + (end_++ - begin_) * row_size_);
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

}  // namespace
