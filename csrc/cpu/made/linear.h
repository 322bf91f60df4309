// Masked linear layers: the product, the input's gradient and the weight's, over the staircase of a mask.
#pragma once

#include "product.h"

#include <functional>
#include <numeric>

namespace genkernels {
namespace made {
namespace {

using namespace product;

// Multiply-adds below which a task is not worth a thread of its own, some 5 µs of them: waking one takes 1 to 10 µs.
constexpr int64_t kWork = 128 * 1024;

inline void for_tasks(int64_t tasks, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  if (tasks > 0) torch::stable::parallel_for(0, tasks, grain, body);
}

// Indices by ascending key in [0, keys), equal ones in their order.
inline std::vector<int64_t> sorted_by(const std::vector<int64_t>& key, int64_t keys) {
  std::vector<int64_t> at(keys + 1, 0), order(key.size());
  for (int64_t k : key) ++at[k + 1];
  for (int64_t k = 0; k < keys; ++k) at[k + 1] += at[k];
  for (size_t i = 0; i < key.size(); ++i) order[at[key[i]]++] = int64_t(i);
  return order;
}

// The staircase of a mask: columns by degree, rows by how many of those they see.
struct Stairs {
  int64_t out, in;
  std::vector<int64_t> columns, rows, depth;  // permutations; depth [out], in the order of `rows`
  int64_t live() const { return std::accumulate(depth.begin(), depth.end(), int64_t(0)); }
  bool plain;  // columns are in place already
};

inline Stairs stairs_of(const Tensor& in_degrees, const Tensor& out_degrees, bool strict) {
  Stairs s{out_degrees.size(0), in_degrees.size(0), {}, {}, {}, true};
  const int64_t* into = data<int64_t>(in_degrees);
  const int64_t* out = data<int64_t>(out_degrees);
  s.plain = std::is_sorted(into, into + s.in);
  s.columns.resize(s.in);
  std::iota(s.columns.begin(), s.columns.end(), 0);
  if (!s.plain)
    std::stable_sort(s.columns.begin(), s.columns.end(), [&](int64_t a, int64_t b) { return into[a] < into[b]; });
  std::vector<int64_t> sorted(s.in), depth(s.out);
  for (int64_t k = 0; k < s.in; ++k) sorted[k] = into[s.columns[k]];
  for (int64_t r = 0; r < s.out; ++r)
    depth[r] = (strict ? std::lower_bound(sorted.begin(), sorted.end(), out[r])
                       : std::upper_bound(sorted.begin(), sorted.end(), out[r])) -
               sorted.begin();
  s.rows = sorted_by(depth, s.in + 1);
  s.depth.resize(s.out);
  for (int64_t r = 0; r < s.out; ++r) s.depth[r] = depth[s.rows[r]];
  return s;
}

// A copy with columns in the order given (rows of `width` numbers, of which `columns` count, zeros beyond).
template <typename T>
void gather_columns(const T* from, int64_t rows, int64_t stride, const std::vector<int64_t>& columns, T* to,
                    int64_t width) {
  const int64_t count = int64_t(columns.size());
  for_tasks(rows, std::max<int64_t>(1, kWork / 8 / std::max<int64_t>(1, width)), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t k = 0; k < count; ++k) to[r * width + k] = from[r * stride + columns[k]];
      std::fill(to + r * width + count, to + (r + 1) * width, T(0));
    }
  });
}

// Samples of a chunk, and into how many parts the rows are cut when there are fewer chunks than threads. live: weights
// that act.
template <typename T>
struct Cut {
  int64_t size, chunks, parts, grain;
  Cut(int64_t samples, int64_t groups, int64_t live) {
    const int64_t most = 8 * kLanes<T>;
    chunks = (samples + most - 1) / most;
    size = chunks ? round_up((samples + chunks - 1) / chunks, kLanes<T>) : 0;
    chunks = size ? (samples + size - 1) / size : 0;
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t each = std::max<int64_t>(1, size * live);
    parts = chunks == 0 || chunks >= threads ? 1 : std::min({(threads + chunks - 1) / chunks, groups, each / kWork});
    parts = std::max<int64_t>(parts, 1);
    grain = std::max<int64_t>(1, kWork * parts / each);
  }
};

constexpr int64_t kGroup = 8 * kRows;  // rows (columns, for the input's gradient) that a part takes at once

template <typename T>
void linear(const Stairs& s, const T* x, int64_t samples, const T* weight, const T* bias, T* y) {
  const int64_t groups = (s.out + kGroup - 1) / kGroup;
  const Cut<T> cut(samples, groups, s.live());
  Scratch<T> gathered(s.plain ? 0 : s.out * s.in);
  if (!s.plain) gather_columns<T>(weight, s.out, s.in, s.columns, gathered, s.in);
  const T* w = s.plain ? weight : static_cast<T*>(gathered);
  for_tasks(cut.chunks * cut.parts, cut.grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task % cut.parts, first = task / cut.parts * cut.size,
                    count = std::min(cut.size, samples - first);
      const int64_t width = round_up(count, kLanes<T>);
      Scratch<T> act(s.in * width), out(kGroup * width);
      turn(x + first * s.in, s.in, count, s.in, [&](int64_t k) { return s.columns[k]; }, static_cast<T*>(act), width);
      for (int64_t g = part; g < groups; g += cut.parts) {
        const int64_t from = g * kGroup, rows = std::min(kGroup, s.out - from);
        const T* pointers[kGroup];
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t row = s.rows[from + r];
          pointers[r] = w + row * s.in;
          std::fill_n(out + r * width, width, bias ? bias[row] : T(0));
        }
        staircase<T>(pointers, rows, 1, act, width, [&](int64_t r) { return s.depth[from + r]; }, out, width, width);
        turn_back(
            static_cast<const T*>(out), width, count, rows, [&](int64_t r) { return s.rows[from + r]; },
            y + first * s.out, s.out);
      }
    }
  });
}

// grad_x = g (W ⊙ M): the same over columns, the deepest first, rows from the last one backwards, over panels of packed
// columns.
template <typename T>
void linear_grad_input(const Stairs& s, const T* g, int64_t samples, const T* weight, T* grad_x) {
  const int64_t groups = (s.in + kGroup - 1) / kGroup;
  const Cut<T> cut(samples, groups, s.live());
  std::vector<int64_t> live(s.in);  // rows that see a column (in the order of columns): the last live[k] of them
  for (int64_t k = 0; k < s.in; ++k) live[k] = s.depth.end() - std::upper_bound(s.depth.begin(), s.depth.end(), k);
  for_tasks(cut.chunks * cut.parts, cut.grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task % cut.parts, first = task / cut.parts * cut.size,
                    count = std::min(cut.size, samples - first);
      const int64_t width = round_up(count, kLanes<T>);
      Scratch<T> act(s.out * width), out(kGroup * width), panel(kGroup * s.out);
      turn(
          g + first * s.out, s.out, count, s.out, [&](int64_t r) { return s.rows[s.out - 1 - r]; },
          static_cast<T*>(act), width);
      for (int64_t group = part; group < groups; group += cut.parts) {
        const int64_t from = group * kGroup, columns = std::min(kGroup, s.in - from);
        const auto column = [&](int64_t j) { return s.columns[from + columns - 1 - j]; };  // ascending in live rows
        const int64_t deepest = live[from];
        for (int64_t r = 0; r < deepest; ++r) {
          const T* row = weight + s.rows[s.out - 1 - r] * s.in;
          T* to = panel + r * columns;
          if (s.plain)
            std::copy_n(row + from, columns, to);
          else
            for (int64_t j = 0; j < columns; ++j) to[j] = row[s.columns[from + j]];
        }
        const T* pointers[kGroup];
        for (int64_t j = 0; j < columns; ++j) pointers[j] = panel + (columns - 1 - j);
        std::fill_n(static_cast<T*>(out), columns * width, T(0));
        staircase<T>(
            pointers, columns, columns, act, width, [&](int64_t j) { return live[from + columns - 1 - j]; }, out, width,
            width);
        turn_back(static_cast<const T*>(out), width, count, columns, column, grad_x + first * s.in, s.in);
      }
    }
  });
}

// The stride of rows of n numbers in whole vectors, off the powers of two that would put all rows into the same few
// cache sets.
template <typename T>
int64_t stride_for(int64_t n) {
  const int64_t stride = round_up(n, kLanes<T>);
  return stride * int64_t(sizeof(T)) % 512 == 0 ? stride + kLanes<T> : stride;
}

// grad[row(r)][column[k]] = ±Σ_n g[r][n]·u[n][k] for the k < depth(r) that row r sees, 0 elsewhere (column null: k). u
// has a stride of `width`, whole vectors in a row; r counts in the order of ascending depth and has its signals, the
// samples side by side, at g_at(r).
template <typename T, typename GAt, typename Depth, typename Row>
void outer(const T* g, int64_t stride, GAt g_at, const T* u, int64_t width, int64_t samples, int64_t rows,
           int64_t columns, Depth depth, Row row, const int64_t* column, T sign, T* grad) {
  const int64_t groups = (rows + kRows - 1) / kRows;
  for_tasks(groups, std::max<int64_t>(1, kWork / std::max<int64_t>(1, columns * samples * kRows / 2)),
            [&](int64_t begin, int64_t end) {
              Scratch<T> out(kRows * width);
              for (int64_t task = begin; task < end; ++task) {
                // groups from both ends in turn: shallow and deep ones are shared out evenly
                const int64_t group = task % 2 ? groups - 1 - task / 2 : task / 2;
                const int64_t from = group * kRows, high = std::min<int64_t>(kRows, rows - from);
                const int64_t wide = round_up(depth(from + high - 1), kLanes<T>);
                const T* pointers[kRows];
                for (int64_t j = 0; j < high; ++j) {
                  pointers[j] = g + g_at(from + j) * stride;
                  std::fill_n(out + j * width, wide, T(0));
                }
                // in strips that the first-level cache holds
                for (int64_t n = 0; n < wide; n += kVectors * kLanes<T>)
                  multiply<T>(pointers, high, 1, u + n, width, samples, out + n, width,
                              std::min(kVectors * kLanes<T>, wide - n));
                for (int64_t j = 0; j < high; ++j) {
                  T* to = grad + row(from + j) * columns;
                  const T* found = out + j * width;
                  const int64_t live = depth(from + j);
                  if (column == nullptr) {
                    for (int64_t k = 0; k < live; ++k) to[k] = sign * found[k];
                    std::fill(to + live, to + columns, T(0));
                  } else {
                    for (int64_t k = 0; k < live; ++k) to[column[k]] = sign * found[k];
                    for (int64_t k = live; k < columns; ++k) to[column[k]] = T(0);
                  }
                }
              }
            });
}

}  // namespace
}  // namespace made
}  // namespace genkernels
