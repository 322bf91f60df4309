// The host's side of the operators of residual blocks: sizes, the workspace, weights and samples in the kernels'
// layout.
#pragma once

#include <algorithm>

#include "gradients.cuh"

namespace genkernels {
namespace residual {
namespace {

constexpr int64_t kMost = (int64_t(1) << 31) - 1;

// Numbers of one tensor, given out as pointers when all have been asked for.
template <typename A>
class Workspace {
 public:
  template <typename Pointer>
  void want(Pointer& pointer, int64_t count) {
    wanted_.push_back({const_cast<A**>(&pointer), total_});
    total_ += (count + 31) / 32 * 32;
  }
  void settle(const Tensor& like) {
    memory_ = empty(like, {std::max<int64_t>(total_, 1)}, Dtype<A>::kType);
    for (const auto& [pointer, at] : wanted_) *pointer = mutable_data<A>(memory_) + at;
    wanted_.clear();
  }

 private:
  std::vector<std::pair<A**, int64_t>> wanted_;
  int64_t total_ = 0;
  Tensor memory_;
};

template <typename S>
class Call {
 public:
  using A = arithmetic_t<S>;

  Call(const char* name, const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
       const Tensor& parameters, int64_t activation)
      : launch(name, x), name_(name), like_(x), weights_(weights), biases_(biases), parameters_(parameters) {
    const size_t maps = weights.size();
    require(maps >= 2 && maps <= kMaps, name, ": the CUDA kernels take 2 to ", kMaps, " maps, got ", maps);
    require(biases.size() == maps && parameters.numel() == static_cast<int64_t>(maps) - 1, name,
            ": weights, biases and parameters must be of one number of maps");
    require(activation >= 0 && activation <= static_cast<int64_t>(Nonlinearity::kClipswish), name,
            ": there is no such activation");
    net.activation = static_cast<Nonlinearity>(activation);
    net.mirrored = net.activation == Nonlinearity::kClipswish;
    net.maps = static_cast<int>(maps);
    samples = x.size(0);
    matrices = x.dim() == 2;
    net.lanes = !matrices ? 1 : samples >= kLargeTile * 128 ? kLargeTile : kSmallTile;
    net.height = matrices ? 1 : size(x.size(2), "rows of pixels");
    net.width = matrices ? net.lanes : size(x.size(3), "columns of pixels");
    const int64_t pixels = int64_t(net.height) * net.width;
    net.images = size(ceil_div(samples, net.lanes) * pixels, "pixels of all samples") / pixels;
    int64_t width = x.size(1);
    for (int i = 0; i < net.maps; ++i) {
      Map<A>& m = net.map[i];
      const Tensor& w = weights[i];
      m.outputs = size(w.size(0), "outputs");
      m.inputs = size(w.size(1), "inputs");
      m.kernel = matrices ? 1 : static_cast<int>(w.size(2));
      require(w.dim() == x.dim() && m.inputs == width && biases[i].numel() == (own(i) ? samples : 1) * m.outputs &&
                  (m.kernel == 1 || m.kernel == 3) && (matrices || w.size(3) == m.kernel),
              name, ": weights and biases must fit together");
      size(w.numel() + 3 * w.size(1) * m.kernel * m.kernel, "numbers of a weight");
      width = int64_t(m.outputs) * (net.mirrored ? 2 : 1);
      size(std::max<int64_t>(width, m.inputs) * pixels, "numbers of a layer for one image");
      if (own(i)) m.bias_pitch = padded(m.outputs);
      size(biases_of(i) * padded(m.outputs), "numbers of a bias");
    }
    require(width == x.size(1) * (net.mirrored ? 2 : 1), name,
            ": the last map must have as many outputs as x has channels");
  }

  // Vectors of `probes` for each sample, whose columns are counted in 32 bits.
  int probes_of(int64_t probes) {
    size((probes + 2) * net.images * net.pixels(), "pixels of all samples and probes");
    return static_cast<int>(probes);
  }

  int64_t features() const { return like_.numel() / std::max<int64_t>(samples, 1); }
  int64_t numbers(int64_t channels) const { return channels * net.pixels(); }  // of an image
  int values(int i) const { return net.map[i + 1].inputs; }                    // of activation i
  int half(int i) const { return net.mirrored ? net.map[i].outputs : 0; }
  Batch batch(int64_t vectors) const { return batch(vectors, features()); }
  Batch batch(int64_t vectors, int64_t numbers) const { return {vectors, samples, net.images, numbers, net.lanes}; }

  // ---- weights ----

  // Asks for room; `arranged` fills it once there is memory.
  void want_weights(bool push, bool pull) {
    push_ = push;
    pull_ = pull;
    for (int i = 0; i < net.maps; ++i) {
      Map<A>& m = net.map[i];
      const int64_t taps = m.kernel * m.kernel;
      if (push) room.want(m.push, taps * m.inputs * padded(m.outputs));
      if (pull) room.want(m.pull, taps * m.outputs * padded(m.inputs));
      room.want(m.bias, biases_of(i) * padded(m.outputs));
    }
    room.want(net.parameters, padded(net.maps));
  }
  void want_trace(Trace<A>& trace, const Tensor& map) {
    require(net.maps == 3 && map.dim() == 3 && (map.size(0) == 1 || map.size(0) == kClasses) &&
                map.size(1) == values(1) && map.size(2) == values(0),
            name_, ": trace_map must be [1 or 9, values of the second activation, of the first], for three maps");
    require(map.size(0) == 1 || (net.height >= 2 && net.width >= 2), name_,
            ": a trace_map of 9 classes needs images of 2x2 or more");
    size(map.numel(), "numbers of trace_map");
    trace.classes = static_cast<int>(map.size(0));
    room.want(trace.push, int64_t(trace.classes) * values(0) * padded(values(1)));
    room.want(trace.pull, int64_t(trace.classes) * values(1) * padded(values(0)));
  }

  void arranged(const Trace<A>* trace = nullptr, const Tensor* trace_map = nullptr) {
    Arrangements<S> work{};
    int64_t blocks = 0;
    const auto add = [&](const S* from, const A* to, int rows, int channels, int taps, int row_stride,
                         int channel_stride, int tap_stride, int row_half, int channel_half, int there) {
      work.all[work.count++] = {from,     const_cast<A*>(to), rows,           channels,
                                taps,     row_stride,         channel_stride, tap_stride,
                                row_half, channel_half,       there,          static_cast<int>(blocks)};
      blocks += ceil_div(int64_t(taps) * channels * padded(rows), kArranged);
    };
    for (int i = 0; i < net.maps; ++i) {
      const Map<A>& m = net.map[i];
      const int taps = m.kernel * m.kernel, line = m.inputs * taps, split = i > 0 ? half(i - 1) : 0;
      const S* from = data<S>(weights_[i]);
      if (push_) add(from, m.push, m.outputs, m.inputs, taps, line, taps, 1, 0, split, m.inputs);
      if (pull_) add(from + taps - 1, m.pull, m.inputs, m.outputs, taps, taps, line, -1, split, 0, m.outputs);
      add(data<S>(biases_[i]), m.bias, m.outputs, static_cast<int>(biases_of(i)), 1, 1, own(i) ? m.outputs : 0, 0, 0, 0,
          own(i) ? static_cast<int>(samples) : 1);
    }
    add(data<S>(parameters_), net.parameters, net.maps - 1, 1, 1, 1, 0, 0, 0, 0, 1);
    if (trace_map != nullptr) {
      const int v1 = values(0), v2 = values(1);
      const S* from = data<S>(*trace_map);
      add(from, trace->push, v2, v1, trace->classes, v1, 1, v1 * v2, half(1), half(0), v1);
      add(from, trace->pull, v1, v2, trace->classes, 1, v1, v1 * v2, half(0), half(1), v2);
    }
    launch(arrange<S>, blocks, dim3(kThreads), work);
  }

  // ---- samples ----

  // Whether tensors of samples lie as the kernels have them.
  static constexpr bool kSame = std::is_same_v<S, A>;
  bool direct() const { return kSame && !matrices; }

  // to [vectors · G, features, lanes]; `from` null for the unit vectors.
  void load(const S* from, int64_t vectors, A* to, const A* each = nullptr) {
    const Batch b = batch(vectors);
    launch(load_images<S>, ceil_div(b.inside(), kThreads), dim3(kThreads), b, BatchDivisors(b), from, each, to,
           b.inside());
  }
  void store(const A* from, int64_t vectors, S* to) { store(from, batch(vectors), to); }
  void store(const A* from, const Batch& b, S* to) {
    launch(store_images<S>, ceil_div(b.outside(), kThreads), dim3(kThreads), b, BatchDivisors(b), from, to,
           b.outside());
  }
  // [samples] to [G, lanes].
  void load_each(const A* from, A* to) {
    const Batch b = batch(1, 1);
    launch(load_images<A>, ceil_div(b.inside(), kThreads), dim3(kThreads), b, BatchDivisors(b), from,
           static_cast<const A*>(nullptr), to, b.inside());
  }

  // ---- gradients ----

  // Room for everything that `gradient_passes` takes; what is loaded goes to map[0].in and the last map's out.
  void want_gradient(Gradient<A>& g, int probes, bool traced, bool by_x) {
    const int64_t vectors = int64_t(1 + probes) * net.images;
    g.probes = probes;
    for (int i = 0; i < net.maps; ++i) {
      Map<A>& m = net.map[i];
      room.want(m.in, vectors * numbers(m.inputs));
      room.want(m.out, vectors * numbers(m.outputs));
      if (i == net.maps - 1) break;
      room.want(m.z, net.images * numbers(m.outputs));
      room.want(m.slope, net.images * numbers(values(i)));
      room.want(m.bent, std::max(probes + (traced ? 1 : 0), 1) * net.images * numbers(m.outputs));
    }
    if (by_x) room.want(g.grad_x, net.images * numbers(net.map[0].inputs));
  }

  // A pass's tiles where a launch does one.
  template <bool kLarge>
  int64_t tiles_of(const Gradient<A>& g, const Step& step) const {
    const bool probes = step.pass == Pass::kTangent || step.pass == Pass::kCotangent;
    const Columns all{0, 1, net.images * (probes ? g.probes : 1), 0, 0, net.height, net.width};
    if (step.pass == Pass::kTrace) return trace_tiles<kLarge>(g.trace, step.i == 1);
    const bool pulls = step.pass == Pass::kCotangent || step.pass == Pass::kDelta;
    return tiles<A, kLarge>(pulls ? net.map[step.i].inputs : net.map[step.i].outputs, all.count());
  }
  template <bool kLarge>
  int64_t trace_tiles(const Trace<A>& trace, bool across) const {
    const Columns all{0, 1, net.images, 0, 0, net.height, net.width};
    int64_t count = 0;
    for (int c = 0; c < trace.classes; ++c)
      count += tiles<A, kLarge>(values(across ? 0 : 1), of_class(all, c, trace.classes).count());
    return count;
  }

  // Runs the passes from `begin` on and sums up. grads: of x, weights, biases, parameters, and of trace_map.
  void gradient(Gradient<A>& g, int begin, const std::vector<Tensor>& grads) {
    const bool alone = matrices && g.probes <= kMostAlone;
    if (alone && net.lanes == kSmallTile)
      passes<false>(g, alone, begin, grads);
    else
      passes<true>(g, alone, begin, grads);
  }

  static constexpr int kMostAlone = 8;  // probes: beyond, a block would have many columns, one after the other

  Launcher launch;
  Network<A> net{};
  Workspace<A> room;
  int64_t samples;
  bool matrices;

 private:
  // Whether a map's bias is each sample's own, and how many there are of it, with those of absent samples.
  bool own(int i) const { return biases_[i].dim() == 2; }
  int64_t biases_of(int i) const { return own(i) ? int64_t(net.images) * net.lanes : 1; }
  int size(int64_t value, const char* what) const {
    require(value <= kMost, name_, ": the CUDA kernels take at most ", kMost, " ", what, ", got ", value);
    return static_cast<int>(value);
  }

  template <bool kLarge>
  void passes(Gradient<A>& g, bool alone, int begin, const std::vector<Tensor>& grads) {
    const bool by_x = g.grad_x != nullptr;
    const int phases = g.phases(net.maps);
    int64_t most = net.images;
    for (int i = begin; i < phases && !alone; ++i) most = std::max(most, tiles_of<kLarge>(g, step_of(g, net.maps, i)));
    g.slots = static_cast<int>(most);
    const Tensor by_parameter =
        torch::stable::new_zeros(like_, std::vector<int64_t>{3, net.maps - 1, most}, Dtype<A>::kType);
    g.by_parameter = mutable_data<A>(by_parameter);
    if (by_x && direct()) g.grad_x = reinterpret_cast<A*>(mutable_data<S>(grads[0]));
    const dim3 block(kThreads);
    if (alone) {
      launch(gradient_passes<A, kLarge>, net.images, block, net, g, true, begin, phases);
    } else {
      for (int i = begin; i < phases; ++i)
        launch(gradient_passes<A, kLarge>, tiles_of<kLarge>(g, step_of(g, net.maps, i)), block, net, g, false, i,
               i + 1);
    }
    if (by_x && !direct()) store(g.grad_x, 1, mutable_data<S>(grads[0]));
    sum_up(g, grads);
  }

  void sum_up(const Gradient<A>& g, const std::vector<Tensor>& grads) {
    Outers<A> outers{};
    PartSums<S> parts{};
    RowSums<S> rows{};
    std::vector<int64_t> places;
    outers.height = net.height;
    outers.width = net.width;
    outers.lanes = net.lanes;
    outers.factor = g.first;
    int64_t blocks = 0, sum_blocks = 0, row_blocks = 0, total = 0;
    const auto add = [&](Outer<A> o, S* to) {
      const int64_t count = int64_t(o.outputs) * o.inputs * o.taps(), columns = o.columns.count();
      PartSum<S> sum{nullptr, to, count, 0, static_cast<int>(sum_blocks)};
      sum_blocks += ceil_div(count, kThreads);
      places.push_back(total);
      if (columns > 0) {
        const int64_t wished = std::max<int64_t>(1, std::min(512 / int64_t(o.tiles()), ceil_div(columns, 128)));
        o.chunk = static_cast<int>(ceil_div(ceil_div(columns, wished), 16) * 16);
        o.parts = sum.parts = static_cast<int>(ceil_div(columns, o.chunk));
        o.first = static_cast<int>(blocks);
        blocks += int64_t(o.parts) * o.tiles();
        total += o.parts * count;
        outers.all[outers.count++] = o;
      }
      parts.all[parts.count++] = sum;
    };
    const Columns all{0, 1, net.images * (1 + g.probes), 0, 0, net.height, net.width};
    Columns samples_alone = all;
    samples_alone.images = net.images;
    for (int i = 0; i < net.maps; ++i) {
      const Map<A>& m = net.map[i];
      add({m.out, m.in, nullptr, nullptr, m.outputs, m.inputs, m.kernel, 0, i > 0 ? half(i - 1) : 0, 0, 0, 0, all},
          mutable_data<S>(grads[1 + i]));
      S* by_bias = mutable_data<S>(grads[1 + net.maps + i]);
      if (own(i) && matrices) {
        store(m.out, batch(1, m.outputs), by_bias);
        continue;
      }
      // of samples' own biases each row of each image by itself
      const int images = own(i) ? 1 : net.images, sums = own(i) ? net.images * m.outputs : m.outputs;
      rows.all[rows.count++] = {m.out, by_bias, net.pixels(), images, sums, static_cast<int>(row_blocks)};
      row_blocks += sums;
    }
    rows.all[rows.count++] = {g.by_parameter, mutable_data<S>(grads[1 + 2 * net.maps]),
                              g.slots,        3,
                              net.maps - 1,   static_cast<int>(row_blocks)};
    row_blocks += net.maps - 1;
    for (int c = 0; g.traced() && c < g.trace.classes; ++c)
      add({net.map[1].slope, net.map[0].slope, nullptr, g.each, values(1), values(0), 1, half(1), half(0), 0, 0, 0,
           of_class(samples_alone, c, g.trace.classes)},
          mutable_data<S>(grads[2 + 2 * net.maps]) + int64_t(c) * values(1) * values(0));
    const Tensor memory = empty(like_, {std::max<int64_t>(total, 1)}, Dtype<A>::kType);
    for (int i = 0, o = 0; i < parts.count; ++i) {
      parts.all[i].from = mutable_data<A>(memory) + places[i];
      if (parts.all[i].parts > 0) outers.all[o++].to = mutable_data<A>(memory) + places[i];
    }
    launch(outer_products<A>, blocks, dim3(kThreads), outers);
    launch(sum_parts<S>, sum_blocks, dim3(kThreads), parts);
    launch(sum_images<S>, row_blocks, dim3(kThreads), rows);
  }

  const char* name_;
  const Tensor& like_;
  const std::vector<Tensor>&weights_, &biases_;
  const Tensor& parameters_;
  bool push_ = false, pull_ = false;
};

// Gradients as the operators return them: of x, of each weight and bias, of the parameters; zeros for no samples.
inline std::vector<Tensor> gradients_like(const Tensor& x, const std::vector<Tensor>& weights,
                                          const std::vector<Tensor>& biases, const Tensor& parameters) {
  std::vector<Tensor> grads = {empty(x)};
  const auto add = [&](const Tensor& t) { grads.push_back(x.size(0) ? empty(t) : zeros(t, shape_of(t))); };
  for (const Tensor& t : weights) add(t);
  for (const Tensor& t : biases) add(t);
  add(parameters);
  return grads;
}

}  // namespace
}  // namespace residual
}  // namespace genkernels
