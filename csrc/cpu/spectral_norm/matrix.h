// Power iteration on matrices in one read of each weight.
//
// A layer's rows are cut into blocks. For a block b, a few rows at a time: u'_m = ⟨W_m, v⟩, and in the next pass, those
// rows being in the inner caches still, v'_b += s u'_m W_m, s being a power of two that keeps the products within
// range: u' is as large as the weights are, and its square need not be a number. Lengths and s are put right where the
// blocks are added up: u = u'/‖u'‖, v' = Σ_b v'_b / (s ‖u'‖) = Wᵀu, σ = ‖v'‖ (which is ⟨u, W v⟩ for v = v'/‖v'‖), in an
// order that depends on the layer's shape alone.
//
// Where u' or v' has no direction (a weight of zeros, or not finite), the vector stays what it was, and each product is
// taken by itself.
#pragma once

#include "layers.h"

namespace genkernels {
namespace spectral {

constexpr int64_t kBlock = 64 * 1024;  // weights of a block, where that is kFewest rows or more
constexpr int64_t kFewest = 16;
constexpr int kRows = 4;              // in registers
constexpr int64_t kChunk = 4 * 1024;  // columns whose products are added up in T, chunks then in fp64
constexpr int64_t kColumns = 1024;    // of a tile of v'

template <typename S>
struct Matrix {
  using T = arithmetic_t<S>;

  const S* weight;  // [rows, columns]
  int64_t rows, columns, each, blocks;
  T *u, *v, *raw, *next, *parts;  // u, v; u', v'; v'_b [blocks, columns]
  std::vector<int> exponent;      // s = 2^-exponent of each block
  std::vector<T> join;            // what each block's v' is multiplied by
  std::vector<Squares> lengths;   // of each tile of v'
  bool turned = false;            // the map is the transpose: u here is its v, and the reverse
  double length_u = 0, length_v = 0;
  T sigma = 0, factor = 1;

  void shape(const S* w, int64_t m, int64_t k) {
    weight = w;
    rows = m;
    columns = k;
    blocks = std::max<int64_t>(1, std::min(rows / kFewest, rows * columns / kBlock));
    each = round_up(divide_up(rows, blocks), kRows);
    blocks = divide_up(rows, each);
    exponent.resize(blocks);
    join.resize(blocks);
    lengths.resize(divide_up(columns, kColumns));
  }
  int64_t scratch_size() const { return 2 * rows + (2 + blocks) * columns; }
  void allocate(Arena<T>& arena) {
    arena.need(u, rows);
    arena.need(raw, rows);
    arena.need(v, columns);
    arena.need(next, columns);
    arena.need(parts, blocks * columns);
  }
};

// ---- a block of rows --------------------------------------------------------------------------------------------

// One pass over the columns: to += Σ_r c_r added_r, and sums[r] = ⟨dotted_r, v⟩. While the rows of the one product come
// out of the inner caches, those of the other are on their way from memory.
template <typename T, int A, int D>
void pass(const T* const* added, const T* c, T* to, const T* const* dotted, const T* v, T* sums, int64_t n) {
  using Vec = typename Vector<T>::type;
  constexpr int64_t L = kLanes<T>;
  const T *x[A + 1], *w[D + 1];
  Vec by[A + 1];
  for (int r = 0; r < A; ++r) {
    x[r] = added[r];
    by[r] = c[r] - Vec{};
  }
  for (int r = 0; r < D; ++r) w[r] = dotted[r];
  double total[D + 1] = {};
  for (int64_t k = 0; k < n;) {
    const int64_t end = std::min(n, k + kChunk);
    Vec sum[D + 1] = {};
    for (; k + L <= end; k += L) {
      if constexpr (D > 0) {
        const Vec vk = load_vector(v + k);
#pragma GCC unroll 4
        for (int r = 0; r < D; ++r) sum[r] += load_vector(w[r] + k) * vk;
      }
      if constexpr (A > 0) {
        Vec t = load_vector(to + k);
#pragma GCC unroll 4
        for (int r = 0; r < A; ++r) t += by[r] * load_vector(x[r] + k);
        store_vector<T>(t, to + k);
      }
    }
    T rest[D + 1] = {};
    for (; k < end; ++k) {
      for (int r = 0; r < D; ++r) rest[r] += w[r][k] * v[k];
      if constexpr (A > 0) {
        T t = to[k];
        for (int r = 0; r < A; ++r) t += by[r][0] * x[r][k];
        to[k] = t;
      }
    }
    for (int r = 0; r < D; ++r) {
      alignas(64) T lane[L];
      store_vector<T>(sum[r], lane);
      for (int64_t width = L / 2; width; width /= 2)
        for (int64_t j = 0; j < width; ++j) lane[j] += lane[j + width];
      total[r] += double(lane[0]) + double(rest[r]);
    }
  }
  for (int r = 0; r < D; ++r) sums[r] = T(total[r]);
}

// The same for groups of no row, one, or kRows.
template <typename T>
void pass(int added, const T* const* x, const T* c, T* to, int dotted, const T* const* w, const T* v, T* sums,
          int64_t n) {
  const auto with = [&]<int A>() {
    if (dotted == kRows) return pass<T, A, kRows>(x, c, to, w, v, sums, n);
    if (dotted == 1) return pass<T, A, 1>(x, c, to, w, v, sums, n);
    return pass<T, A, 0>(x, c, to, w, v, sums, n);
  };
  if (added == kRows) return with.template operator()<kRows>();
  if (added == 1) return with.template operator()<1>();
  return with.template operator()<0>();
}

// Brings u' of a group of rows in range, and v' along.
template <typename S>
void scale(Matrix<S>& m, int64_t b, bool first, int count, arithmetic_t<S>* c) {
  using T = arithmetic_t<S>;
  T largest = 0;
  for (int r = 0; r < count; ++r) largest = std::max(largest, std::fabs(c[r]));
  if (!(largest > 0) || !std::isfinite(largest)) return;
  int& e = m.exponent[b];
  const int own = std::max(std::ilogb(largest), std::numeric_limits<T>::min_exponent - 1);
  if (first || own > e + 10) {
    T* to = m.parts + b * m.columns;
    const T by = first ? T(1) : std::ldexp(T(1), e - own);
    for (int64_t k = 0; k < m.columns && !first; ++k) to[k] *= by;
    e = own;
  }
  for (int r = 0; r < count; ++r) c[r] = std::ldexp(c[r], -e);
}

enum class Sweep { kBoth, kForward, kTranspose };  // u' and v'; u' alone; v' = Wᵀu for the u that there is

template <typename S>
void sweep(Matrix<S>& m, int64_t b, Sweep what) {
  using T = arithmetic_t<S>;
  constexpr bool kPlain = std::is_same_v<S, T>;
  const int64_t n = m.columns, end = std::min(m.rows, (b + 1) * m.each);
  T* to = m.parts + b * n;
  T* room = kPlain ? nullptr : scratch<T>(1, 2 * kRows * n);
  const T *w[kRows] = {}, *x[kRows] = {};
  T c[kRows] = {};
  int added = 0;
  bool first = true;  // no u' but 0 so far
  m.exponent[b] = 0;
  if (what != Sweep::kForward) std::fill_n(to, n, T(0));
  for (int64_t row = b * m.each; row < end || added;) {
    const int count = row + kRows <= end ? kRows : row < end ? 1 : 0;
    for (int r = 0; r < count; ++r) w[r] = as_arithmetic(m.weight + (row + r) * n, kPlain ? nullptr : room + r * n, n);
    pass<T>(added, x, c, to, what == Sweep::kTranspose ? 0 : count, w, m.v, m.raw + row, n);
    added = 0;
    if (what != Sweep::kForward && count) {
      std::copy_n((what == Sweep::kBoth ? m.raw : m.u) + row, count, c);
      if (what == Sweep::kBoth) scale(m, b, first, count, c);
      first = first && std::all_of(c, c + count, [](T value) { return value == 0; });
      std::copy_n(w, count, x);
      added = count;
    }
    if (!kPlain) room = room == scratch<T>(1, 2 * kRows * n) ? room + kRows * n : scratch<T>(1, 2 * kRows * n);
    row += count;
  }
}

// Tile t of v' = Σ_b join_b v'_b.
template <typename S>
void join(Matrix<S>& m, int64_t t) {
  using T = arithmetic_t<S>;
  const int64_t begin = t * kColumns, count = std::min(kColumns, m.columns - begin);
  T* to = m.next + begin;
  for (int64_t b = 0; b < m.blocks; ++b) {
    const T *from = m.parts + b * m.columns + begin, by = m.join[b];
    if (b == 0)
      for (int64_t k = 0; k < count; ++k) to[k] = by * from[k];
    else
      for (int64_t k = 0; k < count; ++k) to[k] += by * from[k];
  }
  m.lengths[t] = squares(to, count);
}

}  // namespace spectral
}  // namespace genkernels
