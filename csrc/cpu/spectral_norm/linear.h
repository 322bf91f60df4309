// A linear layer of a few inputs whose normalised weight is never written (genkernels/nn/_scaled_norm.py has the
// maths): B inputs x_b, z_b = W x_b, y_b = f z_b + bias; backward Σ_b f g_b x_bᵀ − (⟨f g, z⟩ / σ) u vᵀ, and f Wᵀ g_b.
//
// With few inputs the time is that of the weights' bytes, which each of the three products reads, or writes, once, what
// belongs to the inputs being in the inner caches. Forward: several rows at a time, sums of kChunk columns in T, these
// in fp64. By the weight: the norm's part is one more term of each row. By the inputs: stretches of columns, whose sums
// of kTall rows are added up.
#pragma once

#include "matrix.h"

namespace genkernels {
namespace spectral {

constexpr int kFew = 8;                 // inputs at most
constexpr int64_t kShare = 32 * 1024;   // weights that a thread takes at a time
constexpr int64_t kStretch = 4 * 1024;  // bytes of a row that are done with before the next row
constexpr int64_t kTall = 256;          // rows whose products are added up one after the other

// Calls f.operator()<N>() for the N of 1 to kMost that n is.
template <int kMost, typename F>
void with_number(int64_t n, F f) {
  if constexpr (kMost > 0) {
    if (n == kMost) return f.template operator()<kMost>();
    with_number<kMost - 1>(n, f);
  }
}

// sums[r * B + b] = ⟨w_r, x_b⟩ of R rows.
template <typename T, int B, int R>
void products_of_rows(const T* w, const T* x, int64_t columns, double* sums) {
  using Vec = typename Vector<T>::type;
  constexpr int64_t L = kLanes<T>;
  std::fill_n(sums, R * B, 0.0);
  for (int64_t k = 0; k < columns;) {
    const int64_t end = std::min(columns, k + kChunk);
    Vec sum[R][B] = {};
    for (; k + L <= end; k += L) {
      Vec xs[B];
#pragma GCC unroll 8
      for (int b = 0; b < B; ++b) xs[b] = load_vector(x + b * columns + k);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec wk = load_vector(w + r * columns + k);
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b) sum[r][b] += wk * xs[b];
      }
    }
    T rest[R][B] = {};
    for (; k < end; ++k)
      for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b) rest[r][b] += w[r * columns + k] * x[b * columns + k];
    for (int r = 0; r < R; ++r)
      for (int b = 0; b < B; ++b) {
        alignas(64) T lane[L];
        store_vector<T>(sum[r][b], lane);
        for (int64_t width = L / 2; width; width /= 2)
          for (int64_t j = 0; j < width; ++j) lane[j] += lane[j + width];
        sums[r * B + b] += double(lane[0]) + double(rest[r][b]);
      }
  }
}

// to_r = Σ_t c[r * N + t] term_t of R rows, n columns of them.
template <typename T, int N, int R>
void sums_of_terms(const T* const* term, const T* c, T* to, int64_t columns, int64_t n) {
  using Vec = typename Vector<T>::type;
  constexpr int64_t L = kLanes<T>;
  const T* from[N];
  Vec by[R][N];
  for (int t = 0; t < N; ++t) {
    from[t] = term[t];
    for (int r = 0; r < R; ++r) by[r][t] = c[r * N + t] - Vec{};
  }
  int64_t k = 0;
  for (; k + L <= n; k += L) {
    Vec sum[R];
#pragma GCC unroll 9
    for (int t = 0; t < N; ++t) {
      const Vec value = load_vector(from[t] + k);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[r] = t ? sum[r] + by[r][t] * value : by[r][t] * value;
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) store_vector<T>(sum[r], to + r * columns + k);
  }
  for (; k < n; ++k)
    for (int r = 0; r < R; ++r) {
      T sum = c[r * N] * from[0][k];
      for (int t = 1; t < N; ++t) sum += c[r * N + t] * from[t][k];
      to[r * columns + k] = sum;
    }
}

// to_b += Σ_r c[b * R + r] w_r of R rows, n columns of them.
template <typename T, int B, int R>
void add_rows(const T* w, int64_t columns, const T* c, T* to, int64_t line, int64_t n) {
  using Vec = typename Vector<T>::type;
  constexpr int64_t L = kLanes<T>;
  int64_t k = 0;
  for (; k + L <= n; k += L) {
    Vec row[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) row[r] = load_vector(w + r * columns + k);
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      Vec sum = load_vector(to + b * line + k);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum += c[b * R + r] * row[r];
      store_vector<T>(sum, to + b * line + k);
    }
  }
  for (; k < n; ++k)
    for (int b = 0; b < B; ++b) {
      T sum = to[b * line + k];
      for (int r = 0; r < R; ++r) sum += c[b * R + r] * w[r * columns + k];
      to[b * line + k] = sum;
    }
}

template <typename T>
struct Linear {
  int64_t inputs, rows, columns;
  const T *x, *weight;  // [inputs, columns], [rows, columns]

  // Calls f(first row, row after the last) for all rows in shares.
  template <typename F>
  void each_share(int64_t unit, F f) const {
    const int64_t each = round_up(std::max<int64_t>(1, kShare / columns), unit), shares = divide_up(rows, each);
    torch::stable::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) f(s * each, std::min(rows, (s + 1) * each));
    });
  }

  void forward(const T* bias, T factor, T* y, T* z) const {
    with_number<kFew>(inputs, [&]<int B>() {
      constexpr int R = B == 1 ? 4 : std::max(1, 8 / B);
      each_share(R, [&](int64_t begin, int64_t end) {
        for (int64_t m = begin; m < end;) {
          const int count = m + R <= end ? R : 1;
          double sums[R * B];
          if (count == R)
            products_of_rows<T, B, R>(weight + m * columns, x, columns, sums);
          else
            products_of_rows<T, B, 1>(weight + m * columns, x, columns, sums);
          for (int r = 0; r < count; ++r, ++m)
            for (int b = 0; b < B; ++b) {
              const T value = T(sums[r * B + b]);
              z[b * rows + m] = value;
              y[b * rows + m] = bias ? factor * value + bias[m] : factor * value;
            }
        }
      });
    });
  }

  // g: f times the gradient. scale: what u vᵀ is multiplied by, where it is.
  void by_weight(const T* g, const T* u, const T* v, bool divides, T scale, T* out) const {
    const T* term[kFew + 1];
    for (int64_t b = 0; b < inputs; ++b) term[b] = x + b * columns;
    term[inputs] = v;
    with_number<kFew + 1>(inputs + (divides ? 1 : 0), [&]<int N>() {
      constexpr int R = N <= 4 ? 2 : 1;
      const auto some = [&]<int Count>(int64_t m, int64_t k, int64_t n) {
        const T* from[N];
        T c[Count * N];
        for (int t = 0; t < N; ++t) {
          from[t] = term[t] + k;
          for (int r = 0; r < Count; ++r) c[r * N + t] = t < inputs ? g[t * rows + m + r] : scale * u[m + r];
        }
        sums_of_terms<T, N, Count>(from, c, out + m * columns + k, columns, n);
      };
      constexpr int64_t kWide = kStretch / sizeof(T);
      each_share(R, [&](int64_t begin, int64_t end) {
        for (int64_t k = 0; k < columns; k += kWide) {
          const int64_t n = std::min(kWide, columns - k);
          int64_t m = begin;
          for (; m + R <= end; m += R) some.template operator()<R>(m, k, n);
          for (; m < end; ++m) some.template operator()<1>(m, k, n);
        }
      });
    });
  }

  void by_inputs(const T* g, T* out) const {
    constexpr int64_t kWide = kStretch / sizeof(T);
    constexpr int R = 4;
    with_number<kFew>(inputs, [&]<int B>() {
      torch::stable::parallel_for(0, divide_up(columns, kWide), 1, [&](int64_t first, int64_t last) {
        T* part = scratch<T>(1, B * kWide);
        for (int64_t s = first; s < last; ++s) {
          const int64_t k = s * kWide, n = std::min(kWide, columns - k);
          for (int64_t begin = 0; begin < rows; begin += kTall) {
            const int64_t end = std::min(rows, begin + kTall);
            std::fill_n(part, B * kWide, T(0));
            int64_t m = begin;
            T c[B * R];
            for (; m + R <= end; m += R) {
              for (int b = 0; b < B; ++b) std::copy_n(g + b * rows + m, R, c + b * R);
              add_rows<T, B, R>(weight + m * columns + k, columns, c, part, kWide, n);
            }
            for (; m < end; ++m) {
              for (int b = 0; b < B; ++b) c[b] = g[b * rows + m];
              add_rows<T, B, 1>(weight + m * columns + k, columns, c, part, kWide, n);
            }
            for (int b = 0; b < B; ++b) {
              T* to = out + b * columns + k;
              for (int64_t j = 0; j < n; ++j) to[j] = begin ? to[j] + part[b * kWide + j] : part[b * kWide + j];
            }
          }
        }
      });
    });
  }
};

}  // namespace spectral
}  // namespace genkernels
