// Power iteration on matrices in one read of each weight.
//
// A layer's rows are cut into blocks. For a block b, a few rows at a time: u'_m = ⟨W_m, v⟩, then, those rows being in
// the inner caches still, v'_b += s u'_m W_m, s being a power of two that keeps the products within range: u' is as
// large as the weights are, and its square need not be a number. Lengths and s are put right where the blocks are added
// up: u = u'/‖u'‖, v' = Σ_b v'_b / (s ‖u'‖) = Wᵀu, σ = ‖v'‖ (which is ⟨u, W v⟩ for v = v'/‖v'‖), in an order that
// depends on the layer's shape alone.
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

// ---- arithmetic -------------------------------------------------------------------------------------------------

// sums[r] = ⟨w_r, v⟩
template <typename T, int R>
void dots(const T* const* w, const T* v, int64_t n, T* sums) {
  using Vec = typename Vector<T>::type;
  constexpr int64_t L = kLanes<T>;
  double total[R] = {};
  for (int64_t k = 0; k < n;) {
    const int64_t end = std::min(n, k + kChunk);
    Vec a[R] = {}, b[R] = {};
    for (; k + 2 * L <= end; k += 2 * L) {
      const Vec v0 = load_vector(v + k), v1 = load_vector(v + k + L);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        a[r] += load_vector(w[r] + k) * v0;
        b[r] += load_vector(w[r] + k + L) * v1;
      }
    }
    for (; k + L <= end; k += L) {
      const Vec v0 = load_vector(v + k);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) a[r] += load_vector(w[r] + k) * v0;
    }
    T rest[R] = {};
    for (; k < end; ++k)
      for (int r = 0; r < R; ++r) rest[r] += w[r][k] * v[k];
    for (int r = 0; r < R; ++r) {
      alignas(64) T lane[L];
      store_vector<T>(a[r] + b[r], lane);
      for (int64_t width = L / 2; width; width /= 2)
        for (int64_t j = 0; j < width; ++j) lane[j] += lane[j + width];
      total[r] += double(lane[0]) + double(rest[r]);
    }
  }
  for (int r = 0; r < R; ++r) sums[r] = T(total[r]);
}

// to (+)= Σ_r c_r w_r, the next rows being fetched meanwhile.
template <typename T, int R, bool First, bool Ahead>
void add_rows(const T* const* w, const T* c, int64_t n, const char* ahead, int64_t row_bytes, T* to) {
  using Vec = typename Vector<T>::type;
  constexpr int64_t L = kLanes<T>;
  const T* row[R];
  Vec by[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    row[r] = w[r];
    by[r] = c[r] - Vec{};
  }
  int64_t k = 0;
  for (; k + L <= n; k += L) {
    Vec sum = First ? Vec{} : load_vector(to + k);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      sum += by[r] * load_vector(row[r] + k);
      if constexpr (Ahead) __builtin_prefetch(ahead + r * row_bytes + k * int64_t(sizeof(T)), 0, 2);
    }
    store_vector<T>(sum, to + k);
  }
  for (; k < n; ++k) {
    T sum = First ? T(0) : to[k];
    for (int r = 0; r < R; ++r) sum += by[r][0] * row[r][k];
    to[k] = sum;
  }
}

// ---- a block of rows --------------------------------------------------------------------------------------------

enum class Sweep { kBoth, kForward, kTranspose };  // u' and v'; u' alone; v' = Wᵀu for the u that there is

template <typename S, int R>
void sweep_rows(Matrix<S>& m, int64_t b, int64_t row, Sweep what, bool& first) {
  using T = arithmetic_t<S>;
  const int64_t n = m.columns;
  const T* w[R];
  T* buffer = std::is_same_v<S, T> ? nullptr : scratch<T>(1, kRows * n);
  for (int r = 0; r < R; ++r) w[r] = as_arithmetic(m.weight + (row + r) * n, buffer ? buffer + r * n : nullptr, n);
  if (what != Sweep::kTranspose) dots<T, R>(w, m.v, n, m.raw + row);
  if (what == Sweep::kForward) return;
  T c[R], largest = 0;
  for (int r = 0; r < R; ++r) {
    c[r] = what == Sweep::kTranspose ? m.u[row + r] : m.raw[row + r];
    largest = std::max(largest, std::fabs(c[r]));
  }
  if (what == Sweep::kBoth && largest == 0) return;
  T* to = m.parts + b * n;
  int& e = m.exponent[b];
  if (what == Sweep::kBoth && std::isfinite(largest)) {
    constexpr int kLowest = std::numeric_limits<T>::min_exponent - 1;
    const int own = std::max(std::ilogb(largest), kLowest);
    if (first) {
      e = own;
    } else if (own > e + 10) {
      const T by = std::ldexp(T(1), e - own);
      for (int64_t k = 0; k < n; ++k) to[k] *= by;
      e = own;
    }
    for (int r = 0; r < R; ++r) c[r] = std::ldexp(c[r], -e);
  }
  const bool more = std::is_same_v<S, T> && row + R + kRows <= m.rows;
  const char* ahead = more ? reinterpret_cast<const char*>(m.weight + (row + R) * n) : nullptr;
  const auto add = first ? (more ? add_rows<T, R, true, true> : add_rows<T, R, true, false>)
                         : (more ? add_rows<T, R, false, true> : add_rows<T, R, false, false>);
  add(w, c, n, ahead, n * int64_t(sizeof(S)), to);
  first = false;
}

template <typename S>
void sweep(Matrix<S>& m, int64_t b, Sweep what) {
  const int64_t end = std::min(m.rows, (b + 1) * m.each);
  m.exponent[b] = 0;
  bool first = true;
  int64_t row = b * m.each;
  for (; row + kRows <= end; row += kRows) sweep_rows<S, kRows>(m, b, row, what, first);
  for (; row + 2 <= end; row += 2) sweep_rows<S, 2>(m, b, row, what, first);
  for (; row < end; ++row) sweep_rows<S, 1>(m, b, row, what, first);
  if (what != Sweep::kForward && first) std::fill_n(m.parts + b * m.columns, m.columns, arithmetic_t<S>(0));
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

// ---- many matrices at once --------------------------------------------------------------------------------------

template <typename S>
class Matrices {
  using T = arithmetic_t<S>;

 public:
  explicit Matrices(std::vector<Matrix<S>>& layers) : layers_(layers) {
    for (size_t i = 0; i < layers.size(); ++i) {
      all_.push_back(int64_t(i));
      for (int64_t b = 0; b < layers[i].blocks; ++b) blocks_.push_back({int64_t(i), b});
    }
  }

  // Power iterations and the norm; of none, that of the vectors given.
  void iterate(int64_t iterations) {
    for (int64_t i = 0; i < iterations; ++i) once(i + 1 == iterations);
    if (iterations == 0) norms_of_vectors(all_);
  }

  // f(layer, first row, rows) for every block, as the threads had them, the last one first.
  template <typename F>
  void backwards(F f) {
    each_block(blocks_, true,
               [&](Matrix<S>& m, int64_t b) { f(m, b * m.each, std::min(m.each, m.rows - b * m.each)); });
  }

 private:
  template <typename F>
  void each_block(const std::vector<Piece>& blocks, bool reversed, F f) {
    const auto cost = [&](const Piece& p) { return layers_[p.layer].each * layers_[p.layer].columns; };
    share_out(blocks, cost, reversed, [&](const Piece& p) { f(layers_[p.layer], p.index); });
  }

  void once(bool last) {
    each_block(blocks_, false, [](Matrix<S>& m, int64_t b) { sweep(m, b, Sweep::kBoth); });
    for (Matrix<S>& m : layers_) {
      const Squares s = squares(m.raw, m.rows);
      m.length_u = length(&s, 1);
      int exponent = 0;
      const double part = std::frexp(m.length_u, &exponent);
      const bool fine = has_direction<T>(m.length_u);
      for (int64_t b = 0; b < m.blocks; ++b)
        m.join[b] = fine ? T(std::ldexp(1.0 / part, m.exponent[b] - exponent)) : T(0);
    }
    join_all(all_);
    std::vector<int64_t> apart;
    for (int64_t i : all_) {
      Matrix<S>& m = layers_[i];
      if (has_direction<T>(m.length_u)) divide(m.raw, m.length_u, m.u, m.rows);
      if (has_direction<T>(m.length_u) && has_direction<T>(m.length_v)) {
        divide(m.next, m.length_v, m.v, m.columns);
        m.sigma = T(m.length_v);
      } else {
        apart.push_back(i);
      }
    }
    if (apart.empty()) return;
    each_block(blocks_of(apart), false, [](Matrix<S>& m, int64_t b) { sweep(m, b, Sweep::kTranspose); });
    for (int64_t i : apart) std::fill(layers_[i].join.begin(), layers_[i].join.end(), T(1));
    join_all(apart);
    std::vector<int64_t> without;
    for (int64_t i : apart) {
      Matrix<S>& m = layers_[i];
      m.sigma = T(m.length_v);
      if (has_direction<T>(m.length_v))
        divide(m.next, m.length_v, m.v, m.columns);
      else
        without.push_back(i);
    }
    if (last && !without.empty()) norms_of_vectors(without);
  }

  void join_all(const std::vector<int64_t>& which) {
    std::vector<Piece> tiles;
    for (int64_t i : which)
      for (size_t t = 0; t < layers_[i].lengths.size(); ++t) tiles.push_back({i, int64_t(t)});
    const auto cost = [&](const Piece& p) {
      return (layers_[p.layer].blocks + 4) * std::min(kColumns, layers_[p.layer].columns);
    };
    share_out(tiles, cost, false, [&](const Piece& p) { join(layers_[p.layer], p.index); });
    for (int64_t i : which) layers_[i].length_v = length(layers_[i].lengths.data(), int64_t(layers_[i].lengths.size()));
  }

  void norms_of_vectors(const std::vector<int64_t>& which) {
    each_block(blocks_of(which), false, [](Matrix<S>& m, int64_t b) { sweep(m, b, Sweep::kForward); });
    for (int64_t i : which) {
      Matrix<S>& m = layers_[i];
      m.sigma = T(inner(m.u, m.raw, m.rows));
    }
  }

  std::vector<Piece> blocks_of(const std::vector<int64_t>& which) const {
    std::vector<Piece> some;
    for (int64_t i : which)
      for (int64_t b = 0; b < layers_[i].blocks; ++b) some.push_back({i, b});
    return some;
  }

  std::vector<Matrix<S>>& layers_;
  std::vector<int64_t> all_;
  std::vector<Piece> blocks_;
};

}  // namespace spectral
}  // namespace genkernels
