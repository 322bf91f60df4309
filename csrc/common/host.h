// What the host code of every backend shares: names of the stable ABI, a tensor's memory, fresh tensors, the dispatch
// on dtypes, and errors of one sentence.
//
// A backend's source registers operators; each of them describes its call, allocates, looks at the dtypes and hands
// over to kernels (CPU) or launchers (CUDA). Where two backends have an operator, all of this but the last step stands
// in csrc/common/<operator>.h, with the backend as a template argument. Shapes, devices and contiguity were checked
// above, in genkernels/ops, which also has the schemas; here only what memory safety needs and Python does not look at.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#if defined(__linux__) && !defined(USE_CUDA)
#  include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace genkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

// ---- errors -----------------------------------------------------------------------------------------------------

template <typename... Parts>
[[noreturn]] void fail(const Parts&... sentence) {
  std::ostringstream text;
  (text << ... << sentence);
  throw std::runtime_error(text.str());  // torch makes it a RuntimeError
}

template <typename... Parts>
void require(bool holds, const Parts&... sentence) {
  if (!holds) fail(sentence...);
}

// ---- types ------------------------------------------------------------------------------------------------------

template <typename T>
struct Dtype;
template <>
struct Dtype<double> {
  static constexpr ScalarType kType = ScalarType::Double;
  static constexpr const char* kName = "float64";
};
template <>
struct Dtype<float> {
  static constexpr ScalarType kType = ScalarType::Float;
  static constexpr const char* kName = "float32";
};
template <>
struct Dtype<BFloat16> {
  static constexpr ScalarType kType = ScalarType::BFloat16;
  static constexpr const char* kName = "bfloat16";
};
template <>
struct Dtype<Half> {
  static constexpr ScalarType kType = ScalarType::Half;
  static constexpr const char* kName = "float16";
};
template <>
struct Dtype<int64_t> {
  static constexpr ScalarType kType = ScalarType::Long;
  static constexpr const char* kName = "int64";
};
template <>
struct Dtype<bool> {
  static constexpr ScalarType kType = ScalarType::Bool;
  static constexpr const char* kName = "bool";
};

// ---- tensors ----------------------------------------------------------------------------------------------------

// What a kernel reads, as it reads it. What comes past the checks above, of a torch operator called by itself or of a
// hook that changed a saved tensor, would be other numbers.
template <typename T>
const T* data(const Tensor& t) {
  require(t.scalar_type() == Dtype<T>::kType && t.is_contiguous(), "genkernels: a kernel must be given contiguous ",
          Dtype<T>::kName, " here, got another dtype or order");
  return static_cast<const T*>(t.const_data_ptr());
}
template <typename T>
const T* data(const std::optional<Tensor>& t) {
  return t.has_value() ? data<T>(*t) : nullptr;
}
template <typename T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

inline std::vector<int64_t> shape_of(const Tensor& t) {
  std::vector<int64_t> shape(t.dim());
  for (int64_t i = 0; i < t.dim(); ++i) shape[i] = t.size(i);
  return shape;
}

// A tensor [N, ...] as N rows of L numbers.
struct Rows {
  int64_t count, length;
};
inline Rows rows_of(const Tensor& t) {
  require(t.dim() >= 1, "genkernels: a tensor must be [N, ...] here, got []");
  Rows rows{t.size(0), 1};
  for (int64_t d = 1; d < t.dim(); ++d) rows.length *= t.size(d);
  return rows;
}

// Asks for large pages where tensors that nobody has written to yet hold whole ones, across the border of two that lie
// side by side too. Memory that malloc has just got from the system costs a fault for every page that is touched: of
// 4 KiB each, that took ten times as long as the writing in a virtual machine (12 MB: 4.1 ms, of 2 MiB 0.23 ms). What
// malloc hands out twice is not asked for again. Advice alone: a system without such pages gives others.
inline void in_large_pages(const std::vector<Tensor>& fresh) {
#if defined(__linux__) && !defined(USE_CUDA)
  constexpr uintptr_t kLarge = 2 << 20, kBetween = 64 * 1024;  // what may lie between two
  std::vector<std::pair<uintptr_t, uintptr_t>> ranges;
  uintptr_t total = 0;
  for (const Tensor& t : fresh) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(t.const_data_ptr()), bytes = t.numel() * t.element_size();
    ranges.emplace_back(begin, begin + bytes);
    total += bytes;
  }
  if (total < kLarge) return;
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 0; i < ranges.size();) {
    auto [begin, end] = ranges[i];
    while (++i < ranges.size() && ranges[i].first <= end + kBetween) end = std::max(end, ranges[i].second);
    begin = (begin + kLarge - 1) / kLarge * kLarge, end = end / kLarge * kLarge;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
}

// Contiguous tensors on like's device: with memory as it comes, or zeros.
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  const Tensor fresh = torch::stable::new_empty(like, shape, dtype);
  in_large_pages({fresh});
  return fresh;
}
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& shape) {
  return empty(like, shape, like.scalar_type());
}
inline Tensor empty(const Tensor& like) {
  return empty(like, shape_of(like));
}
inline std::vector<Tensor> empty(const std::vector<Tensor>& likes) {
  std::vector<Tensor> fresh;
  for (const Tensor& like : likes) fresh.push_back(torch::stable::new_empty(like, shape_of(like)));
  in_large_pages(fresh);
  return fresh;
}
inline Tensor zeros(const Tensor& like, const std::vector<int64_t>& shape) {
  return torch::stable::new_zeros(like, shape);
}

// ---- dtypes -----------------------------------------------------------------------------------------------------

// The type that values of storage type S are computed in.
template <typename S>
using arithmetic_t = std::conditional_t<std::is_same_v<S, double>, double, float>;

inline ScalarType arithmetic_dtype(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls f.operator()<T>() for the one of the types Ts that `t` holds; `what` names the tensor in the error.
template <typename... Ts, typename F>
void with_dtype(const char* what, const Tensor& t, F&& f) {
  const ScalarType type = t.scalar_type();
  if (((type == Dtype<Ts>::kType && (f.template operator()<Ts>(), true)) || ...)) return;
  std::string names;
  ((names += (names.empty() ? "" : ", ") + std::string(Dtype<Ts>::kName)), ...);
  fail(what, " must have one of the dtypes ", names);
}

}  // namespace genkernels
