// x from y = x + g(x) for a residual block on the CPU; genkernels/reference/invertible_residual.py has the maths.
//
// A thread keeps a tile of samples in flight: one evaluation of g serves all of them (residual_block/tile.h), then each
// takes its own accelerated step (residual_block/anderson.h). A sample that has converged gives its place to the next
// one of the thread's share, and where there is none the tile becomes narrower: no evaluation is spent on what is done.
// The gradient solves the transposed equation in the same way over slopes that are computed once, whose columns move
// together as samples end, and then differentiates g in one pass.
//
// Flops: g for each iteration of each sample, and for the step up to 25 D more; backward Jᵀ for each, and 5 passes.
// Bytes: nothing beside y and x leaves the caches. Samples depend on no other, so that neither the batch nor the number
// of threads changes a bit of one. Half numbers are computed in fp32.
#include "residual_block/anderson.h"
#include "residual_block/gradient.h"

namespace genkernels {
namespace block {
namespace {

// A sample's numbers, one after the other, to its columns of a tile and back.
template <typename T>
void put(const Grid& grid, const T* from, int64_t channels, int64_t slot, T* to, int64_t plane) {
  for (int64_t c = 0; c < channels; ++c)
    grid.rows_of(slot, [&](int64_t row) {
      grid.copy_row(from, to + c * plane + row);
      from += grid.width;
    });
}

template <typename T>
struct Outcome {
  T* x;
  T* residual;
  int64_t* iterations;
  bool* converged;

  void give(int64_t sample, const Iteration<T>& it, int64_t size) const {
    std::copy_n(it.best(), size, x + sample * size);
    if (residual == nullptr) return;
    residual[sample] = it.residual();
    iterations[sample] = it.taken();
    converged[sample] = it.converged();
  }
};

// r = y − x − what the tile gives for the slot.
template <typename T>
void leave(const Grid& grid, const T* y, const T* found, int64_t plane, int64_t channels, int64_t slot,
           Iteration<T>& it) {
  int64_t i = 0;
  for (int64_t c = 0; c < channels; ++c)
    grid.rows_of(slot, [&](int64_t row) {
      const T* g = found + c * plane + row;
      for (int64_t k = 0; k < grid.width; ++k, ++i) it.r[i] = y[i] - it.x[i] - g[k];
    });
}

// The samples from `begin` to `end`, those that are in flight in the first slots of the tile.
template <typename T>
void solve(Tile<T>& tile, const T* y, const T* start, const Limits& limits, int64_t begin, int64_t end,
           const Outcome<T>& outcome) {
  const Grid& grid = tile.grid;
  const int64_t channels = tile.net.features(), size = channels * grid.pixels();
  std::vector<Iteration<T>> slots;
  std::vector<int64_t> sample;
  Planes<T> value(grid, channels);
  int64_t next = begin;
  while (int64_t(slots.size()) < grid.samples && next < end) {
    slots.emplace_back(size, limits).begin(y + next * size, start + next * size);
    sample.push_back(next++);
  }
  int64_t active = int64_t(slots.size());
  tile.narrow(active);
  for (int64_t s = 0; s < active; ++s) put(grid, slots[s].x.data(), channels, s, tile.input(0), tile.plane);
  while (active) {
    tile.hold(sample, active);
    tile.evaluate(value.at());
    for (int64_t s = 0; s < active; ++s)
      leave(grid, y + sample[s] * size, value.at(), tile.plane, channels, s, slots[s]);
    const int64_t before = active;
    for (int64_t s = 0; s < active;) {
      if (!slots[s].ended()) {
        slots[s++].step();
        continue;
      }
      outcome.give(sample[s], slots[s], size);
      if (next < end) {
        slots[s].begin(y + next * size, start + next * size);
        sample[s++] = next++;
        continue;
      }
      --active;  // the last one in flight takes the place, and is looked at there
      if (s < active) std::swap(slots[s], slots[active]), std::swap(sample[s], sample[active]);
    }
    if (active && active < before) tile.narrow(active);
    for (int64_t s = 0; s < active; ++s) put(grid, slots[s].x.data(), channels, s, tile.input(0), tile.plane);
    if (grid.reach && active < before) {  // nothing may be left below the last sample
      std::vector<T> none(size, T(0));
      for (int64_t s = active; s < before; ++s) put(grid, none.data(), channels, s, tile.input(0), tile.plane);
    }
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> invertible_residual(Tensor y, std::optional<Tensor> start,
                                                               std::vector<Tensor> weights, std::vector<Tensor> biases,
                                                               Tensor parameters, double rtol, double atol,
                                                               int64_t max_iterations, int64_t depth,
                                                               int64_t activation) {
  require(depth >= 0 && depth <= kMostDepth && (!start.has_value() || start->numel() == y.numel()),
          "invertible_residual: depth must be from 0 to ", kMostDepth, " and start like y");
  const int64_t batch = y.size(0);
  Tensor iterations = empty(y, {batch}, ScalarType::Long), converged = empty(y, {batch}, ScalarType::Bool);
  Tensor residual = empty(y, {batch}, arithmetic_dtype(y));
  const auto run = [&]<typename T>() {
    Given<T> given("invertible_residual", y, weights, biases, parameters, activation);
    Network<T>& net = given.net;
    given.cut(batch);
    net.pack(true, false);
    const Numbers<T> target(y), begins(start.has_value() ? *start : y);
    Result<T> x(y, shape_of(y));
    const Outcome<T> outcome{x, mutable_data<T>(residual), mutable_data<int64_t>(iterations),
                             mutable_data<bool>(converged)};
    if (y.numel()) {
      const int64_t tiles = (batch + net.grid.samples - 1) / net.grid.samples;
      const int64_t shares = std::min<int64_t>(tiles, torch::stable::get_num_threads());
      torch::stable::parallel_for(0, shares, 1, [&](int64_t from, int64_t to) {
        Tile<T> tile(net);
        for (int64_t share = from; share < to; ++share) {
          tile.narrow(net.grid.samples);
          solve(tile, static_cast<const T*>(target), static_cast<const T*>(begins), {rtol, atol, max_iterations, depth},
                batch * share / shares, batch * (share + 1) / shares, outcome);
        }
      });
    } else {
      std::fill_n(mutable_data<int64_t>(iterations), batch, int64_t(0));
      std::fill_n(mutable_data<bool>(converged), batch, false);
      std::fill_n(mutable_data<T>(residual), batch, std::numeric_limits<T>::infinity());
    }
    return x.done();
  };
  Tensor x =
      arithmetic_dtype(y) == ScalarType::Double ? run.template operator()<double>() : run.template operator()<float>();
  return {x, residual, iterations, converged};
}

// ---- backward ---------------------------------------------------------------------------------------------------

// w = grad − Jᵀ w for the samples of a linearized tile; outcome.x is w.
template <typename T>
void solve_transposed(Tile<T>& tile, const T* grad, const Limits& limits, int64_t first, int64_t count,
                      const Outcome<T>& outcome) {
  const Grid& grid = tile.grid;
  const int64_t channels = tile.net.features(), size = channels * grid.pixels();
  std::vector<Iteration<T>> slots;
  std::vector<int64_t> column(count);  // where a sample's slopes are
  for (int64_t s = 0; s < count; ++s) {
    slots.emplace_back(size, limits).begin(grad + (first + s) * size, grad + (first + s) * size);
    column[s] = s;
  }
  Planes<T> w(grid, channels), found(grid, channels);
  const std::vector<T> none(size, T(0));
  int64_t width = count;  // slots that the tile computes
  tile.narrow(width);
  std::vector<int64_t> left(count);
  for (int64_t s = 0; s < count; ++s) left[s] = s;
  while (!left.empty()) {
    for (int64_t s : left) put(grid, slots[s].x.data(), channels, column[s], w.at(), tile.plane);
    tile.pull(w.at(), found.at());
    std::vector<int64_t> still;
    for (int64_t s : left) {
      leave(grid, grad + (first + s) * size, found.at(), tile.plane, channels, column[s], slots[s]);
      if (slots[s].ended()) {
        outcome.give(first + s, slots[s], size);
        put(grid, none.data(), channels, column[s], w.at(), tile.plane);
      } else {
        slots[s].step();
        still.push_back(s);
      }
    }
    left = still;
    const int64_t wanted = int64_t(left.size());
    if (!grid.flat || wanted == 0 || round_up(wanted, grid.lanes) >= round_up(width, grid.lanes)) continue;
    // those that are left move to the first columns, in order
    for (int64_t i = 0; i < tile.last(); ++i)
      for (int64_t c = 0; c < tile.net.values(i); ++c) {
        T* row = tile.slope(i) + c * tile.plane;
        for (int64_t k = 0; k < wanted; ++k) row[k] = row[column[left[k]]];
      }
    for (int64_t k = 0; k < wanted; ++k) column[left[k]] = k;
    width = wanted;
    tile.narrow(width);
    for (int64_t c = 0; c < channels; ++c) std::fill_n(w.at() + c * tile.plane, tile.columns, T(0));
  }
}

template <typename T>
std::vector<Tensor> backward(const Tensor& grad, const Tensor& x, const std::vector<Tensor>& weights,
                             const std::vector<Tensor>& biases, const Tensor& parameters, const Limits& limits,
                             int64_t activation) {
  Given<T> given("invertible_residual", x, weights, biases, parameters, activation);
  Network<T>& net = given.net;
  const int64_t batch = x.size(0), channels = net.features(), maps = net.count();
  require(grad.numel() == x.numel(), "invertible_residual: the gradient must be like x");
  given.cut(batch);
  net.pack(true, true);
  const Numbers<T> points(x), by_x(grad);
  Result<T> by_y(x, shape_of(x));
  T* w = by_y;
  const Outcome<T> outcome{w, nullptr, nullptr, nullptr};
  const int64_t tiles = x.numel() ? (batch + net.grid.samples - 1) / net.grid.samples : 0, parts = parts_of(tiles);
  std::vector<Sums<T>> sums(parts);
  Gradients<T> gradients(weights, biases, parameters);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    Tile<T> tile(net);
    Planes<T> delta(net.grid, channels);
    const std::vector<T*> none(maps - 1, nullptr);
    for (int64_t part = begin; part < end; ++part) {
      sums[part].shape(net, gradients.by_bias());
      for (int64_t t = tiles * part / parts; t < tiles * (part + 1) / parts; ++t) {
        const int64_t from = t * net.grid.samples, some = std::min(net.grid.samples, batch - from);
        tile.narrow(net.grid.samples);
        tile.hold(from, some);
        net.grid.stage(static_cast<const T*>(points), channels, from, some, tile.input(0));
        tile.linearize(nullptr);
        solve_transposed(tile, static_cast<const T*>(by_x), limits, from, some, outcome);
        tile.narrow(net.grid.samples);
        tile.linearize(nullptr);  // the solve has moved the slopes
        net.grid.stage(static_cast<const T*>(w), channels, from, some, delta.at());
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t q = 0; q < tile.columns; ++q) delta.at()[c * tile.plane + q] *= T(-1);
        differentiate(tile, sums[part], delta.at(), none, false);
      }
    }
  });
  gradients.give(sums);
  std::vector<Tensor> out{by_y.done()};
  gradients.append_to(out);
  return out;
}

std::vector<Tensor> invertible_residual_backward(Tensor grad, Tensor x, std::vector<Tensor> weights,
                                                 std::vector<Tensor> biases, Tensor parameters, double rtol,
                                                 double atol, int64_t max_iterations, int64_t depth,
                                                 int64_t activation) {
  require(depth >= 0 && depth <= kMostDepth, "invertible_residual: depth must be from 0 to ", kMostDepth);
  const Limits limits{rtol + atol, 0, max_iterations, depth};  // a loss may be of any scale: relative alone
  if (arithmetic_dtype(x) == ScalarType::Double)
    return backward<double>(grad, x, weights, biases, parameters, limits, activation);
  return backward<float>(grad, x, weights, biases, parameters, limits, activation);
}

}  // namespace
}  // namespace block
}  // namespace genkernels

STABLE_TORCH_LIBRARY_IMPL(genkernels, CPU, m) {
  using namespace genkernels::block;
  m.impl("invertible_residual", TORCH_BOX(&invertible_residual));
  m.impl("invertible_residual_backward", TORCH_BOX(&invertible_residual_backward));
}
