// Planar and radial flows on the CPU, K layers in one pass; genkernels/reference/elementary_flows.py has the maths,
// common/elementary_flows.h that of one layer and row.
//
// Layout. Rows are the SIMD lanes: a tile of 64 rows goes through all K layers as [D][64], in the first cache,
// so that neither the sums over D nor the tanh and the logarithm leave a lane idle or ask for a sum across lanes. Where
// the rows of a tile share the parameters these are broadcast; amortised ones of fewer than 32 samples are transposed,
// 16 examples a tile, and stand in the lanes beside their rows.
//
// Backward. The inputs alone are saved: a row is 4·D bytes, what its K layers pass is K times that, and a layer has no
// inverse by which to come back. A tile is taken forward again, leaving z, tanh and its slope of each layer in scratch
// memory, [K][D + 2][64] (16 KB for K = 16, D = 2), which also spares backward every transcendental function, and back.
//
// Bytes: forward reads and writes z, backward reads z and a gradient and writes one; for D = 2 in fp32 20 B a row
// forward and 28 B backward. Arithmetic, a row and layer of a planar flow: forward 4·D, a tanh (40 operations) and a
// logarithm (30); backward 4·D and the tanh again, then 8·D + 15. For K = 16 and D = 2 that is 1.2 k operations a row
// each way: it is arithmetic that sets the time, by far.
//
// Sums over rows: blocks of kBlock rows, each in a fixed order, are added up in fp64, in order: the same bits for any
// number of threads.
#include "elementary_flows/layers.h"

namespace genkernels {
namespace flows {
namespace {

constexpr int kRows = 64, kExamples = kSumLanes;  // lanes of a tile of rows, and of one of examples
constexpr int64_t kBlock = 512;                   // rows whose sums are kept in lanes
constexpr int64_t kGrain = 1024 * 1024;           // operations below which a second thread does not pay

// Rows of a tile: lane l holds row first + l·step, for l < count.
struct Tile {
  int64_t first, step, count;
};

template <typename S, typename T, int kLanes>
void load_rows(const S* from, const Tile& tile, int64_t features, T* to) {
  for (int64_t d = 0; d < features; ++d) {
    T* lanes = to + d * kLanes;
    for (int64_t l = 0; l < tile.count; ++l)
      lanes[l] = static_cast<T>(from[(tile.first + l * tile.step) * features + d]);
    for (int64_t l = tile.count; l < kLanes; ++l) lanes[l] = T(0);
  }
}

template <typename S, typename T, int kLanes>
void store_rows(const T* from, const Tile& tile, int64_t features, S* to) {
  for (int64_t d = 0; d < features; ++d)
    for (int64_t l = 0; l < tile.count; ++l)
      to[(tile.first + l * tile.step) * features + d] = static_cast<S>(from[d * kLanes + l]);
}

// Parameters of `count` groups from `first` on, to [layer][number][P] and back.
template <typename S, int P, typename F>
void for_each_parameter(const Sizes& sizes, const int64_t (&widths)[3], int64_t first, int64_t count, F&& f) {
  int64_t offset = 0;
  const int64_t all = widths[0] + widths[1] + widths[2];
  for (int j = 0; j < 3; offset += widths[j++])
    for (int64_t k = 0; k < sizes.layers; ++k)
      for (int64_t i = 0; i < widths[j]; ++i)
        for (int64_t l = 0; l < count; ++l)
          f(j, ((first + l) * sizes.layers + k) * widths[j] + i, (k * all + offset + i) * P + l);
}

// One call: its tensors, and the scratch memory of a thread.
template <typename Kind, typename S>
struct Call {
  using T = arithmetic_t<S>;
  Sizes sizes;
  Layers<Kind, T> layers{sizes.layers, sizes.features};
  int64_t widths[3] = {width<Kind>(sizes.features, 0), width<Kind>(sizes.features, 1), width<Kind>(sizes.features, 2)};
  const S* parameters[3];
  const S* z;
  // forward
  S* z_out = nullptr;
  T* ldj = nullptr;
  // backward
  const S* grad_z = nullptr;
  const T* grad_ldj = nullptr;
  S* by_z = nullptr;
  S* by_parameters[3] = {};

  int64_t sum_numbers() const { return sizes.layers * layers.sums(); }

  template <int kLanes, int P>
  struct Room {
    std::vector<T> given, ready, z, kept, sum, gradients;
    explicit Room(const Call& c, bool backward)
        : given(c.sizes.layers * c.layers.given() * P),
          ready(c.sizes.layers * c.layers.ready() * P),
          z(c.sizes.features * kLanes),
          kept(backward ? c.sizes.layers * c.layers.kept() * kLanes : 0),
          sum(backward ? c.sum_numbers() * kSumLanes : 0),
          gradients(backward ? given.size() : 0) {}
  };

  template <int kLanes, int P>
  void prepare(int64_t first, int64_t count, Room<kLanes, P>& room) const {
    if (count < P) std::fill(room.given.begin(), room.given.end(), T(0));
    for_each_parameter<S, P>(sizes, widths, first, count, [&](int j, int64_t at, int64_t to) {
      room.given[to] = static_cast<T>(parameters[j][at]);
    });
    layers.template prepare<P>(room.given.data(), room.ready.data());
  }

  template <int kLanes, int P>
  void forward(const Tile& tile, Room<kLanes, P>& room) const {
    T sum[kLanes] = {};
    load_rows<S, T, kLanes>(z, tile, sizes.features, room.z.data());
    layers.template forward<kLanes, P>(room.given.data(), room.ready.data(), room.z.data(), sum, nullptr);
    store_rows<S, T, kLanes>(room.z.data(), tile, sizes.features, z_out);
    store_rows<T, T, kLanes>(sum, tile, 1, ldj);
  }

  template <int kLanes, int P>
  void backward(const Tile& tile, Room<kLanes, P>& room) const {
    T by_ldj[kLanes] = {};
    load_rows<S, T, kLanes>(z, tile, sizes.features, room.z.data());
    layers.template forward<kLanes, P>(room.given.data(), room.ready.data(), room.z.data(), nullptr, room.kept.data());
    if (grad_z)
      load_rows<S, T, kLanes>(grad_z, tile, sizes.features, room.z.data());
    else
      std::fill(room.z.begin(), room.z.end(), T(0));
    if (grad_ldj) load_rows<T, T, kLanes>(grad_ldj, tile, 1, by_ldj);
    layers.template backward<kLanes, P>(room.given.data(), room.ready.data(), room.kept.data(), by_ldj, room.z.data(),
                                        room.sum.data());
    store_rows<S, T, kLanes>(room.z.data(), tile, sizes.features, by_z);
  }

  // Gradients by parameters from sums [layer][number][P].
  template <int kLanes, int P>
  void finish(int64_t first, int64_t count, const T* sum, Room<kLanes, P>& room) const {
    layers.template finish<P>(room.given.data(), room.ready.data(), sum, room.gradients.data());
    for_each_parameter<S, P>(sizes, widths, first, count, [&](int j, int64_t at, int64_t from) {
      by_parameters[j][at] = static_cast<S>(room.gradients[from]);
    });
  }

  // Calls f(begin, end) for shares of `tasks` tasks of so many rows each.
  template <typename F>
  void shared_out(int64_t tasks, int64_t rows, F&& f) const {
    const int64_t operations = std::max<int64_t>(1, rows * sizes.layers * (8 * sizes.features + 64));
    torch::stable::parallel_for(0, tasks, std::max<int64_t>(1, kGrain / operations), f);
  }

  // Each lane an example with parameters of its own.
  void by_examples() const {
    constexpr int P = kExamples;
    const bool back = by_z != nullptr;
    shared_out((sizes.groups + P - 1) / P, P * sizes.rows, [&](int64_t begin, int64_t end) {
      Room<P, P> room(*this, back);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task * P, count = std::min<int64_t>(P, sizes.groups - first);
        prepare(first, count, room);
        if (back) std::fill(room.sum.begin(), room.sum.end(), T(0));
        for (int64_t row = 0; row < sizes.rows; ++row) {
          const Tile tile{first * sizes.rows + row, sizes.rows, count};
          back ? backward(tile, room) : forward(tile, room);
        }
        if (back) finish(first, count, room.sum.data(), room);
      }
    });
  }

  // Each lane a row of one group, whose parameters all of them share.
  void by_rows() const {
    const bool back = by_z != nullptr, one = sizes.groups == 1;
    const int64_t blocks = (sizes.rows + kBlock - 1) / kBlock, numbers = sum_numbers();
    std::vector<double> sums(back && blocks > 1 ? sizes.groups * blocks * numbers : 0);
    Room<kRows, 1> common(*this, back);
    if (one) prepare(0, 1, common);
    const auto finish_group = [&](int64_t group, const double* from, int64_t terms, int64_t step,
                                  Room<kRows, 1>& room) {
      for (int64_t i = 0; i < numbers; ++i) {
        double total = 0;
        for (int64_t term = 0; term < terms; ++term) total += from[term * step + i];
        room.sum[i] = static_cast<T>(total);
      }
      finish(group, 1, room.sum.data(), room);
    };
    shared_out(sizes.groups * blocks, std::min(kBlock, sizes.rows), [&](int64_t begin, int64_t end) {
      Room<kRows, 1> room = common;
      std::vector<double> own(back ? numbers : 0);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t group = task / blocks, from = task % blocks * kBlock, to = std::min(from + kBlock, sizes.rows);
        if (!one) prepare(group, 1, room);
        if (back) std::fill(room.sum.begin(), room.sum.end(), T(0));
        for (int64_t row = from; row < to; row += kRows) {
          const Tile tile{group * sizes.rows + row, 1, std::min<int64_t>(kRows, to - row)};
          back ? backward(tile, room) : forward(tile, room);
        }
        if (!back) continue;
        double* total = blocks > 1 ? sums.data() + task * numbers : own.data();
        for (int64_t i = 0; i < numbers; ++i) {
          total[i] = 0;
          for (int l = 0; l < kSumLanes; ++l) total[i] += room.sum[i * kSumLanes + l];
        }
        if (blocks == 1) finish_group(group, total, 1, 0, room);
      }
    });
    if (sums.empty()) return;
    for (int64_t group = 0; group < sizes.groups; ++group) {
      if (!one) prepare(group, 1, common);
      finish_group(group, sums.data() + group * blocks * numbers, blocks, numbers, common);
    }
  }

  void run() const {
    if (sizes.groups > 1 && sizes.rows < kRows / 2)
      by_examples();
    else
      by_rows();
  }
};

// The backend of common/elementary_flows.h.
struct Cpu {
  template <typename Kind, typename S>
  static Call<Kind, S> call(const Sizes& sizes, const Tensor& z, const Parameters& parameters) {
    return {.sizes = sizes,
            .parameters = {data<S>(parameters[0]), data<S>(parameters[1]), data<S>(parameters[2])},
            .z = data<S>(z)};
  }

  template <typename Kind, typename S>
  static void forward(const Sizes& sizes, const Tensor& z, const Parameters& parameters, const Tensor& z_out,
                      const Tensor& ldj) {
    Call<Kind, S> call = Cpu::call<Kind, S>(sizes, z, parameters);
    call.z_out = mutable_data<S>(z_out);
    call.ldj = mutable_data<arithmetic_t<S>>(ldj);
    call.run();
  }

  template <typename Kind, typename S>
  static void backward(const Sizes& sizes, const std::optional<Tensor>& grad_z, const std::optional<Tensor>& grad_ldj,
                       const Tensor& z, const Parameters& parameters, const Tensor& by_z, const Parameters& by) {
    Call<Kind, S> call = Cpu::call<Kind, S>(sizes, z, parameters);
    call.grad_z = data<S>(grad_z);
    call.grad_ldj = data<arithmetic_t<S>>(grad_ldj);
    call.by_z = mutable_data<S>(by_z);
    for (int j = 0; j < 3; ++j) call.by_parameters[j] = mutable_data<S>(by[j]);
    call.run();
  }
};

}  // namespace
}  // namespace flows
}  // namespace genkernels

STABLE_TORCH_LIBRARY_IMPL(genkernels, CPU, m) {
  using namespace genkernels;
  m.impl("planar_flow", TORCH_BOX((&flows::forward<flows::Cpu, flows::Planar>)));
  m.impl("planar_flow_backward", TORCH_BOX((&flows::backward<flows::Cpu, flows::Planar>)));
  m.impl("radial_flow", TORCH_BOX((&flows::forward<flows::Cpu, flows::Radial>)));
  m.impl("radial_flow_backward", TORCH_BOX((&flows::backward<flows::Cpu, flows::Radial>)));
}
