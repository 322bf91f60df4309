// Rational-quadratic splines on the CPU, in one pass; genkernels/reference/rational_quadratic_spline.py has the maths,
// common/rational_quadratic_spline.h that of one number.
//
// Layout. Numbers are the SIMD lanes, kColumns = 16 of them a tile: their parameters, which lie number by number, are
// transposed in registers (transpose.h) to [P][16]. The exponentials of a softmax are summed as they are made; a second
// run adds them up to knots and keeps, lane by lane, those of the bin that the number lies in, so that slopes, roots
// and logarithms are taken once a number. Backward does the same, then spreads seven gradients over P parameters.
//
// Bytes, a number of K = 8 in fp32: forward 4·(23 + 2) = 100, backward 4·(23 + 3) + 4·(23 + 1) = 200 with the gradient
// that comes. Arithmetic: forward 2K exponentials of 20 operations, 2K steps of 12 and some 150 in the bin, 700 in all,
// backward 1000; 16 lanes a vector make that 45 and 65 instructions, to which the transpositions add their 46 and 70
// loads, stores and shuffles over 16. It is arithmetic and loads from the first cache that set the time, not memory.
//
// Log-determinants: blocks of kBlock numbers, whole rows where there is room; a row's are summed in 16 lanes, those in
// fp64, its blocks in order: the same bits for any number of threads.
#include "rational_quadratic_spline/tile.h"

#include "sums.h"

namespace genkernels {
namespace {

using spline::Call;
using spline::Lanes;
using spline::Tile;

constexpr int64_t kBlock = 512, kLeast = 2048;  // numbers of a block; below which a second thread does not pay

// How numbers are cut into blocks: of whole rows, or parts of one.
struct Blocks {
  int64_t rows, length, rows_a_block, blocks_a_row, count;

  explicit Blocks(const Call& c)
      : rows(c.rows),
        length(c.length),
        rows_a_block(std::max<int64_t>(1, kBlock / c.length)),
        blocks_a_row((c.length + kBlock - 1) / kBlock),
        count(blocks_a_row > 1 ? c.rows * blocks_a_row : (c.rows + rows_a_block - 1) / rows_a_block) {}

  // Calls f(first block, end) for runs of blocks among threads.
  template <typename F>
  void for_each(F&& f) const {
    const int64_t numbers = rows * length / count + 1;
    torch::stable::parallel_for(0, count, std::max<int64_t>(1, kLeast / numbers),
                                [&](int64_t begin, int64_t end) { f(begin, end); });
  }
  int64_t row(int64_t block) const { return blocks_a_row > 1 ? block / blocks_a_row : block * rows_a_block; }
  int64_t offset(int64_t block) const {
    return row(block) * length + (blocks_a_row > 1 ? block % blocks_a_row * kBlock : 0);
  }
  int64_t size(int64_t block) const {
    if (blocks_a_row > 1) return std::min(kBlock, (row(block) + 1) * length - offset(block));
    return std::min(rows_a_block, rows - row(block)) * length;
  }
};

template <typename S, typename T>
void take_lanes(const S* from, int64_t count, Lanes<T>& lanes) {
  GK_LANES(l) lanes[l] = T(0);
  if (from) load(from, lanes.values, count);
}

// The backend of common/rational_quadratic_spline.h.
struct Cpu {
  template <typename S, Spline Kind>
  static void forward(const Call& c, const Tensor& input, const Tensor& params, const Tensor& output,
                      const Tensor& ldj) {
    using T = arithmetic_t<S>;
    const S *x = data<S>(input), *p = data<S>(params);
    S* y = mutable_data<S>(output);
    T* log_det = mutable_data<T>(ldj);
    const Blocks blocks(c);
    std::vector<double> parts(blocks.blocks_a_row > 1 ? blocks.count : 0);
    blocks.for_each([&](int64_t begin, int64_t end) {
      Tile<T, Kind> tile(c);
      alignas(64) T ell[kBlock + kColumns];
      for (int64_t block = begin; block < end; ++block) {
        const int64_t offset = blocks.offset(block), size = blocks.size(block);
        for (int64_t i = 0; i < size; i += kColumns) {
          const int64_t at = offset + i, count = std::min(kColumns, size - i);
          Lanes<T> value, out;
          take_lanes(x + at, count, value);
          tile.take(p + at * c.params, count);
          if (c.inverse)
            tile.template forward<true>(value, out, ell + i);
          else
            tile.template forward<false>(value, out, ell + i);
          store(out.values, y + at, count);
        }
        const auto sum = [&](const T* from, int64_t n) {
          return sum_lanes<T>(n, [&](int64_t i) __attribute__((always_inline)) { return from[i]; });
        };
        if (blocks.blocks_a_row > 1)
          parts[block] = sum(ell, size);
        else
          for (int64_t r = 0; r * c.length < size; ++r)
            log_det[blocks.row(block) + r] = T(sum(ell + r * c.length, c.length));
      }
    });
    for (size_t block = 0; block < parts.size();) {
      double total = 0;
      const int64_t row = blocks.row(block);
      for (int64_t b = 0; b < blocks.blocks_a_row; ++b) total += parts[block++];
      log_det[row] = T(total);
    }
  }

  template <typename S, Spline Kind>
  static void backward(const Call& c, const std::optional<Tensor>& grad_output, const std::optional<Tensor>& grad_ldj,
                       const Tensor& x, const Tensor& params, const Tensor& by_input, const Tensor& by_params) {
    using T = arithmetic_t<S>;
    const S *from = data<S>(x), *p = data<S>(params), *g = data<S>(grad_output);
    const T* by_ldj = data<T>(grad_ldj);
    S *to = mutable_data<S>(by_input), *to_params = mutable_data<S>(by_params);
    const Blocks blocks(c);
    blocks.for_each([&](int64_t begin, int64_t end) {
      Tile<T, Kind> tile(c);
      for (int64_t block = begin; block < end; ++block) {
        const int64_t offset = blocks.offset(block), size = blocks.size(block);
        int64_t row = blocks.row(block), left = blocks.blocks_a_row > 1 ? size : c.length;
        for (int64_t i = 0; i < size; i += kColumns) {
          const int64_t at = offset + i, count = std::min(kColumns, size - i);
          Lanes<T> value, gradient, gamma, out;
          take_lanes(from + at, count, value);
          take_lanes(g ? g + at : nullptr, count, gradient);
          for (int64_t l = 0; l < count; ++l, --left) {
            if (left == 0) ++row, left = c.length;
            gamma[l] = by_ldj ? by_ldj[row] : T(0);
          }
          for (int64_t l = count; l < kColumns; ++l) gamma[l] = T(0);
          tile.take(p + at * c.params, count);
          tile.backward(c.inverse, value, gradient, gamma, out);
          store(out.values, to + at, count);
          tile.give(to_params + at * c.params, count);
        }
      }
    });
  }
};

}  // namespace
}  // namespace genkernels

STABLE_TORCH_LIBRARY_IMPL(genkernels, CPU, m) {
  using namespace genkernels;
  m.impl("rational_quadratic_spline", TORCH_BOX(&spline::rational_quadratic_spline<Cpu>));
  m.impl("rational_quadratic_spline_backward", TORCH_BOX(&spline::rational_quadratic_spline_backward<Cpu>));
}
