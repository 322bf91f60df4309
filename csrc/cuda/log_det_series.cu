// genkernels_cuda::log_det_series and its gradient: launches and registration. Kernels: the .cuh and residual_block/.
//
// Launches. Matrices: one for all passes of up to 32 terms, each block going with its 8 samples (64 of 8192 or more)
// through everything. Convolutions: one for each map, and one for each map of each term. Beside them: weights arranged,
// x and probes loaded and results stored (not for fp32 and fp64 images, which lie right), the end. Backward: in the
// same way maps − 1 forward, as many for tangents and for cotangents, maps for the gradient, two for an exact trace;
// then three for all weights, biases and parameters, and one for each bias of matrices that is each sample's own. The
// host waits for nothing; a CUDA graph may capture it all.
//
// Without probes, the determinant and the inverse of the D×D Jacobians are torch's.
#include "log_det_series.cuh"
#include "residual_block/call.cuh"

namespace genkernels {
namespace residual {
namespace {

// torch's linalg_inv_ex (which never makes the host wait, as linalg_inv does) and linalg_slogdet's second result.
Tensor inverse(const Tensor& matrices) {
  using torch::stable::detail::from;
  std::array<StableIValue, 2> stack{from(matrices), from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linalg_inv_ex", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor info = torch::stable::detail::to<Tensor>(stack[1]);
  return torch::stable::contiguous(torch::stable::detail::to<Tensor>(stack[0]));
}
Tensor log_abs_det(const Tensor& matrices) {
  using torch::stable::detail::from;
  std::array<StableIValue, 2> stack{from(matrices)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linalg_slogdet", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor sign = torch::stable::detail::to<Tensor>(stack[0]);
  return torch::stable::contiguous(torch::stable::detail::to<Tensor>(stack[1]));
}

template <typename S>
class SeriesCall : public Call<S> {
  using Base = Call<S>;
  using typename Base::A;

 public:
  using Base::Base, Base::launch, Base::net, Base::room, Base::samples, Base::matrices;

  void run(const Tensor& x, const std::optional<Tensor>& trace_map, const std::optional<Tensor>& probes,
           const std::vector<double>& given, Tensor& value, Tensor& log_det, const Tensor& sums, const Tensor& shrink) {
    const bool whole = !probes.has_value();
    const int64_t vectors = sums.size(0);
    s_.probes = this->probes_of(vectors);
    const std::vector<double> terms = whole ? std::vector<double>{1.0} : given;
    const bool traced = trace_map.has_value() && !terms.empty();
    const int channels = net.map[0].inputs, last = net.maps - 1;
    const int64_t image = this->numbers(channels), quarters = traced ? this->numbers(padded(this->values(1)) / 4) : 0;
    this->want_weights(true, true);
    if (traced) this->want_trace(s_.trace, *trace_map);
    A *x_in = nullptr, *v_in = nullptr, *value_out = nullptr;
    for (int i = 0; i <= last; ++i) {
      Map<A>& m = net.map[i];
      if (i > 0) room.want(m.in, net.images * this->numbers(m.inputs));
      room.want(m.out, vectors * net.images * this->numbers(m.outputs));
      if (i < last) room.want(m.slope, net.images * this->numbers(this->values(i)));
    }
    const bool direct = this->direct();
    if (!direct) room.want(x_in, net.images * image);
    if (!direct) room.want(value_out, net.images * image);
    if (!direct || whole) room.want(v_in, vectors * net.images * image);
    if (!whole && !direct) room.want(s_.sums, vectors * net.images * image);
    if (!whole) room.want(s_.weighted, vectors * net.images * image);
    if (traced) room.want(s_.parts, net.images * quarters);
    room.settle(x);

    this->arranged(&s_.trace, traced ? &*trace_map : nullptr);
    net.map[0].in = direct ? const_cast<A*>(reinterpret_cast<const A*>(data<S>(x))) : x_in;
    if (!direct) this->load(data<S>(x), 1, x_in);
    s_.v = direct && !whole ? reinterpret_cast<const A*>(data<S>(probes)) : v_in;
    if (!direct || whole) this->load(data<S>(probes), vectors, v_in);
    s_.value = direct ? reinterpret_cast<A*>(mutable_data<S>(value)) : value_out;
    if (direct && !whole) s_.sums = reinterpret_cast<A*>(mutable_data<S>(sums));

    const bool alone = matrices && s_.probes <= Base::kMostAlone;
    if (alone && net.lanes == kSmallTile)
      passes<false>(alone, traced, terms);
    else
      passes<true>(alone, traced, terms);

    if (!direct) this->store(s_.value, 1, mutable_data<S>(value));
    if (whole) return determinant(x, log_det, sums);
    launch(series_finish<A>, net.images, dim3(kThreads), net, channels, s_.v,
           terms.empty() ? s_.v : static_cast<const A*>(net.map[last].out),
           terms.empty() ? static_cast<const A*>(nullptr) : static_cast<const A*>(s_.weighted), s_.probes,
           static_cast<const A*>(s_.parts), static_cast<int>(quarters), static_cast<A>(terms.empty() ? 0.0 : terms[0]),
           static_cast<int>(terms.size()), samples, mutable_data<A>(log_det), mutable_data<A>(shrink));
    if (terms.empty()) {
      Tensor none = sums;
      torch::stable::zero_(none);
    } else if (!direct) {
      this->store(s_.sums, vectors, mutable_data<S>(sums));
    }
  }

 private:
  template <bool kLarge>
  void passes(bool alone, bool traced, const std::vector<double>& terms) {
    const int count = static_cast<int>(terms.size()), probes = s_.probes;
    const dim3 block(kThreads);
    for (int before = 0; before == 0 || before < count; before += kTerms) {
      const int here = std::min(count - before, kTerms);
      s_.before = before;
      s_.head = before == 0 ? net.maps + (traced ? 1 : 0) : 0;
      for (int t = 0; t <= here; ++t) {
        const int k = before + t;
        const double sign = k % 2 ? 1.0 : -1.0;  // of term k
        s_.sum_of[t] = k < count && !(traced && k == 0) ? static_cast<A>(-sign * terms[k] / probes) : A(0);
        s_.dot_of[t] = k > 0 && !(traced && k == 1) ? static_cast<A>(sign * terms[k - 1] / (double(k) * probes)) : A(0);
      }
      const int phases = s_.head + here * net.maps;
      if (alone) {
        launch(series_passes<A, kLarge>, net.images, block, net, s_, true, 0, phases);
        continue;
      }
      for (int phase = 0; phase < phases; ++phase) {
        int64_t blocks;
        if (phase < s_.head) {
          blocks = phase == net.maps ? this->template trace_tiles<kLarge>(s_.trace, false)
                                     : tiles<A, kLarge>(net.map[phase].outputs, net.images * net.pixels());
        } else {
          const int i = net.maps - 1 - (phase - s_.head) % net.maps;
          blocks = tiles<A, kLarge>(net.map[i].inputs, net.images * net.pixels() * probes);
        }
        launch(series_passes<A, kLarge>, blocks, block, net, s_, false, phase, phase + 1);
      }
    }
  }

  void determinant(const Tensor& x, Tensor& log_det, const Tensor& sums) {
    const int64_t features = this->features();
    const Tensor matrices_of = empty(x, {samples, features, features}, Dtype<A>::kType);
    const Batch b = this->batch(features);
    launch(jacobian_rows<A>, ceil_div(b.outside(), kThreads), dim3(kThreads), b, BatchDivisors(b),
           static_cast<const A*>(net.map[net.maps - 1].out), mutable_data<A>(matrices_of), b.outside());
    log_det = log_abs_det(matrices_of);
    const Tensor inverses = inverse(matrices_of);
    launch(rows_first<S>, ceil_div(b.outside(), kThreads), dim3(kThreads), b, BatchDivisors(b), data<A>(inverses),
           mutable_data<S>(sums), b.outside());
  }

  Series<A> s_{};
};

std::vector<int64_t> with_lead(int64_t lead, const Tensor& x) {
  std::vector<int64_t> shape = shape_of(x);
  shape.insert(shape.begin(), lead);
  return shape;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> log_det_series(Tensor x, std::vector<Tensor> weights,
                                                          std::vector<Tensor> biases, Tensor parameters,
                                                          std::optional<Tensor> trace_map, std::optional<Tensor> probes,
                                                          std::vector<double> terms, int64_t activation) {
  int64_t features = 1;
  for (int64_t i = 1; i < x.dim(); ++i) features *= x.size(i);
  const int64_t samples = x.size(0), vectors = probes.has_value() ? probes->size(0) : features;
  const ScalarType work = arithmetic_dtype(x);
  Tensor value = empty(x), log_det = empty(x, {samples}, work), sums = empty(x, with_lead(vectors, x));
  require(!probes.has_value() || probes->numel() == sums.numel(), "log_det_series: probes must be [P, N, ...]");
  Tensor shrink = probes.has_value() ? empty(x, {vectors, samples}, work)
                                     : torch::stable::new_zeros(x, std::vector<int64_t>{vectors, samples}, work);
  if (samples == 0) return {value, log_det, sums, shrink};
  with_dtype<float, double, BFloat16, Half>("log_det_series: x", x, [&]<typename S>() {
    SeriesCall<S>("log_det_series", x, weights, biases, parameters, activation)
        .run(x, trace_map, probes, terms, value, log_det, sums, shrink);
  });
  return {value, log_det, sums, shrink};
}

template <typename S>
void run_backward(const std::optional<Tensor>& grad_value, const std::optional<Tensor>& grad_log_det, const Tensor& x,
                  const std::vector<Tensor>& weights, const std::vector<Tensor>& biases, const Tensor& parameters,
                  const std::optional<Tensor>& trace_map, const std::optional<Tensor>& probes, const Tensor& sums,
                  double first, int64_t activation, const std::vector<Tensor>& grads) {
  using A = arithmetic_t<S>;
  Call<S> call("log_det_series_backward", x, weights, biases, parameters, activation);
  auto& net = call.net;
  Gradient<A> g{};
  const int count = grad_log_det.has_value() ? call.probes_of(sums.size(0)) : 0;
  const bool traced = trace_map.has_value() && count > 0;
  call.want_weights(true, true);
  if (traced) call.want_trace(g.trace, *trace_map);
  call.want_gradient(g, count, traced, true);
  A* each = nullptr;
  call.room.want(each, int64_t(net.images) * net.lanes);
  call.room.settle(x);
  call.arranged(&g.trace, traced ? &*trace_map : nullptr);
  g.each = each;
  g.first = static_cast<A>(first);
  const int64_t vector = net.images * call.numbers(net.map[0].inputs);
  A *in = net.map[0].in, *out = net.map[net.maps - 1].out;
  call.load(data<S>(x), 1, in);
  std::optional<Tensor> none;
  if (!grad_value.has_value()) none = zeros(x, shape_of(x));
  call.load(grad_value.has_value() ? data<S>(grad_value) : data<S>(none), 1, out);
  if (count > 0) {
    call.load(data<S>(probes), count, in + vector);
    call.load(data<S>(sums), count, out + vector, data<A>(grad_log_det));
    call.load_each(data<A>(grad_log_det), each);
  }
  call.gradient(g, 0, grads);
}

std::vector<Tensor> log_det_series_backward(std::optional<Tensor> grad_value, std::optional<Tensor> grad_log_det,
                                            Tensor x, std::vector<Tensor> weights, std::vector<Tensor> biases,
                                            Tensor parameters, std::optional<Tensor> trace_map,
                                            std::optional<Tensor> probes, Tensor sums, double first,
                                            int64_t activation) {
  std::vector<Tensor> grads = gradients_like(x, weights, biases, parameters);
  const bool traced = x.size(0) > 0 && grad_log_det.has_value();
  if (trace_map.has_value()) grads.push_back(traced ? empty(*trace_map) : zeros(*trace_map, shape_of(*trace_map)));
  if (x.size(0) == 0) return grads;
  with_dtype<float, double, BFloat16, Half>("log_det_series: x", x, [&]<typename S>() {
    run_backward<S>(grad_value, grad_log_det, x, weights, biases, parameters, trace_map, probes, sums, first,
                    activation, grads);
  });
  return grads;
}

}  // namespace
}  // namespace residual
}  // namespace genkernels

STABLE_TORCH_LIBRARY_IMPL(genkernels_cuda, CUDA, m) {
  using namespace genkernels::residual;
  m.impl("log_det_series", TORCH_BOX(&log_det_series));
  m.impl("log_det_series_backward", TORCH_BOX(&log_det_series_backward));
}
