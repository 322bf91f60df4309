// genkernels_cuda::invertible_residual and its gradient: launches and registration. Kernels: the .cuh and
// residual_block/.
//
// Launches. Weights arranged, y and the start loaded, the whole iteration in one, x stored (not for fp32 and fp64
// images, which lie right). Backward: the same for w, then maps − 1 for the gradients by what stands between the maps
// (one in all for matrices) and three for all weights, biases and parameters, and one for each bias of matrices that is
// each sample's own. The host waits for nothing, however many iterations there are; a CUDA graph may capture it all.
#include "invertible_residual.cuh"
#include "residual_block/call.cuh"

namespace genkernels {
namespace residual {
namespace {

struct Options {
  double rtol, atol;
  int64_t max_iterations, depth;
};

template <typename S>
class SolveCall : public Call<S> {
  using Base = Call<S>;
  using typename Base::A;

 public:
  using Base::Base, Base::launch, Base::net, Base::room, Base::samples, Base::matrices;

  void want_solve(const Options& o) {
    require(o.depth >= 0 && o.depth <= kHistory && o.max_iterations >= 1, "invertible_residual: depth must be 0 to ",
            kHistory, " and max_iterations 1 or more");
    solve.rtol = static_cast<A>(o.rtol);
    solve.atol = static_cast<A>(o.atol);
    solve.max_iterations = static_cast<int>(std::min(o.max_iterations, kMost));
    solve.depth = static_cast<int>(std::min(o.depth, this->features()));
    solve.samples = samples;
    const int64_t numbers = vector();
    for (A** one : {&y, &solve.x, &solve.r, &solve.last_x, &solve.last_r, &solve.best}) room.want(*one, numbers);
    room.want(solve.dx, std::max(solve.depth, 1) * numbers);
    room.want(solve.dr, std::max(solve.depth, 1) * numbers);
    room.want(stops_, net.images);
  }

  // y, the start, and all iterations; the point is at solve.best in the end.
  template <bool kTransposed>
  void iterate(const Tensor& from, const std::optional<Tensor>& start) {
    static_assert(sizeof(A) >= sizeof(int));
    solve.stops = reinterpret_cast<int*>(stops_);
    solve.y = y;
    this->load(data<S>(from), 1, y);
    this->load(start.has_value() ? data<S>(start) : data<S>(from), 1, solve.x);
    const dim3 block(kThreads);
    if (net.lanes == kSmallTile) {
      launch(fixed_point<A, false, kTransposed>, net.images, block, net, solve, 1);
    } else {
      int most = 1;  // tiles of the largest product: more blocks than those would have nothing to do
      for (int i = 0; i < net.maps; ++i)
        most = std::max<int>(most, tiles<A, true>(std::max(net.map[i].inputs, net.map[i].outputs), net.pixels()));
      int ranks = 1;
      while (!matrices && 2 * ranks <= launch.largest_cluster() && 2 * ranks <= most &&
             2 * ranks * int64_t(net.images) <= launch.multiprocessors())
        ranks *= 2;
      launch.clustered(fixed_point<A, true, kTransposed>, int64_t(net.images) * ranks, block, ranks, net, solve, ranks);
    }
  }

  int64_t vector() const { return net.images * this->numbers(net.map[0].inputs); }

  Solve<A> solve{};
  A* y = nullptr;

 private:
  A* stops_ = nullptr;
};

template <typename S>
void run(const Tensor& y, const std::optional<Tensor>& start, const std::vector<Tensor>& weights,
         const std::vector<Tensor>& biases, const Tensor& parameters, const Options& options, int64_t activation,
         const Tensor& x, const Tensor& residual, const Tensor& iterations, const Tensor& converged) {
  using A = arithmetic_t<S>;
  SolveCall<S> call("invertible_residual", y, weights, biases, parameters, activation);
  call.want_weights(true, false);
  call.want_solve(options);
  for (int i = 1; i < call.net.maps; ++i)
    call.room.want(call.net.map[i].in, call.net.images * call.numbers(call.net.map[i].inputs));
  call.room.settle(y);
  call.arranged();
  call.net.map[0].in = call.solve.x;
  if (call.direct()) call.solve.best = reinterpret_cast<A*>(mutable_data<S>(x));
  call.solve.residual = mutable_data<A>(residual);
  call.solve.iterations = mutable_data<int64_t>(iterations);
  call.solve.converged = mutable_data<bool>(converged);
  call.template iterate<false>(y, start);
  if (!call.direct()) call.store(call.solve.best, 1, mutable_data<S>(x));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> invertible_residual(Tensor y, std::optional<Tensor> start,
                                                               std::vector<Tensor> weights, std::vector<Tensor> biases,
                                                               Tensor parameters, double rtol, double atol,
                                                               int64_t max_iterations, int64_t depth,
                                                               int64_t activation) {
  const int64_t samples = y.size(0);
  require(!start.has_value() || start->numel() == y.numel(), "invertible_residual: start must be like y");
  Tensor x = empty(y), residual = empty(y, {samples}, arithmetic_dtype(y)),
         iterations = empty(y, {samples}, ScalarType::Long), converged = empty(y, {samples}, ScalarType::Bool);
  if (samples > 0) {
    with_dtype<float, double, BFloat16, Half>("invertible_residual: y", y, [&]<typename S>() {
      run<S>(y, start, weights, biases, parameters, {rtol, atol, max_iterations, depth}, activation, x, residual,
             iterations, converged);
    });
  }
  return {x, residual, iterations, converged};
}

template <typename S>
void run_backward(const Tensor& grad, const Tensor& x, const std::vector<Tensor>& weights,
                  const std::vector<Tensor>& biases, const Tensor& parameters, const Options& options,
                  int64_t activation, const std::vector<Tensor>& grads) {
  using A = arithmetic_t<S>;
  SolveCall<S> call("invertible_residual_backward", x, weights, biases, parameters, activation);
  Gradient<A> g{};
  call.want_weights(true, true);
  call.want_solve(options);
  call.want_gradient(g, 0, false, false);
  call.room.settle(x);
  call.arranged();
  call.load(data<S>(x), 1, call.net.map[0].in);
  if (call.direct()) call.solve.best = reinterpret_cast<A*>(mutable_data<S>(grads[0]));
  call.solve.negative = call.net.map[call.net.maps - 1].out;
  call.solve.relative = true;  // gradients may be of any size
  call.template iterate<true>(grad, std::nullopt);
  if (!call.direct()) call.store(call.solve.best, 1, mutable_data<S>(grads[0]));
  call.gradient(g, call.net.maps - 1, grads);  // arguments and slopes are there already
}

std::vector<Tensor> invertible_residual_backward(Tensor grad, Tensor x, std::vector<Tensor> weights,
                                                 std::vector<Tensor> biases, Tensor parameters, double rtol,
                                                 double atol, int64_t max_iterations, int64_t depth,
                                                 int64_t activation) {
  std::vector<Tensor> grads = gradients_like(x, weights, biases, parameters);
  if (x.size(0) == 0) return grads;
  with_dtype<float, double, BFloat16, Half>("invertible_residual: x", x, [&]<typename S>() {
    run_backward<S>(grad, x, weights, biases, parameters, {rtol, atol, max_iterations, depth}, activation, grads);
  });
  return grads;
}

}  // namespace
}  // namespace residual
}  // namespace genkernels

STABLE_TORCH_LIBRARY_IMPL(genkernels_cuda, CUDA, m) {
  using namespace genkernels::residual;
  m.impl("invertible_residual", TORCH_BOX(&invertible_residual));
  m.impl("invertible_residual_backward", TORCH_BOX(&invertible_residual_backward));
}
