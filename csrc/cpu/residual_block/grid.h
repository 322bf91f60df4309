// How samples lie in scratch: a plane a channel, samples below one another, zeros between rows and between samples
// where a map reaches to its neighbours. A fully connected block's sample is one column.
#pragma once

#include "../made/product.h"
#include "../masked_conv/products.h"
#include "../vector.h"

#include <vector>

namespace genkernels {
namespace block {

using product::round_up;
using product::Scratch;

struct Grid {
  int64_t height = 1, width = 1, reach = 0, samples = 1;  // of an image; how far a map reaches; samples of a tile
  int64_t lanes = 1;
  bool flat = true;  // a fully connected block's: x is [N, D]

  int64_t pitch() const { return width + reach; }
  int64_t pixels() const { return height * width; }
  int64_t rows() const { return height + reach; }  // of a sample, the zeros behind it included
  int64_t first(int64_t sample) const { return sample * rows() * pitch(); }
  int64_t columns() const { return round_up(((samples - 1) * rows() + height - 1) * pitch() + width, lanes); }
  int64_t origin() const { return round_up(reach * pitch() + reach, lanes); }
  // an odd number of cache lines, lest all channels fall into one set of the cache
  int64_t plane() const {
    const int64_t lines = (origin() + columns() + reach * pitch() + reach + 15) / 16;
    return (lines | 1) * 16;
  }

  // A row of an image: std::copy_n is a slow `rep movs` for so few.
  template <typename T>
  void copy_row(const T* from, T* to) const {
    masked::load_row(from, to, width);
  }

  // [N, channels, H, W] or [N, channels] to planes from sample `from` on, and back. Samples beyond `count` are zeros.
  template <typename T>
  void stage(const T* x, int64_t channels, int64_t from, int64_t count, T* to) const {
    if (flat) {
      product::turn(x + from * channels, channels, count, channels, [](int64_t c) { return c; }, to, plane());
      for (int64_t c = 0; c < channels; ++c) std::fill(to + c * plane() + columns(), to + (c + 1) * plane(), T(0));
      return;
    }
    for (int64_t s = 0; s < samples; ++s)
      for (int64_t c = 0; c < channels; ++c) {
        T* at = to + c * plane() + first(s);
        const T* image = x + ((from + s) * channels + c) * pixels();
        for (int64_t y = 0; y < height; ++y) {
          if (s < count)
            copy_row(image + y * width, at + y * pitch());
          else
            std::fill_n(at + y * pitch(), width, T(0));
        }
      }
  }
  template <typename T>
  void unstage(const T* from, int64_t channels, int64_t to, int64_t count, T* x) const {
    if (flat) {
      product::turn_back(from, plane(), count, channels, [](int64_t c) { return c; }, x + to * channels, channels);
      return;
    }
    for (int64_t s = 0; s < count; ++s)
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t y = 0; y < height; ++y)
          copy_row(from + c * plane() + first(s) + y * pitch(), x + (((to + s) * channels + c) * height + y) * width);
  }

  // 1 where a column is a pixel, 0 between; empty where all are.
  template <typename T>
  std::vector<T> keep() const {
    if (reach == 0) return {};
    std::vector<T> found(columns(), T(0));
    for (int64_t s = 0; s < samples; ++s)
      for (int64_t y = 0; y < height; ++y) std::fill_n(found.begin() + first(s) + y * pitch(), width, T(1));
    return found;
  }

  // The columns of each class of pixels (genkernels/reference/_block.py), sample by sample.
  std::vector<std::vector<int64_t>> classes(int64_t count) const {
    std::vector<std::vector<int64_t>> found(count);
    const auto line = [](int64_t i, int64_t n) { return i == n - 1 ? 2 : i == 0 ? 0 : 1; };
    for (int64_t s = 0; s < samples; ++s)
      for (int64_t y = 0; y < height; ++y)
        for (int64_t x = 0; x < width; ++x)
          found[count == 1 ? 0 : 3 * line(y, height) + line(x, width)].push_back(first(s) + y * pitch() + x);
    return found;
  }

  // sum over a sample's columns
  template <typename T>
  double sum(const T* columns, int64_t sample) const {
    double total = 0;
    for (int64_t y = 0; y < height; ++y) {
      const T* row = columns + first(sample) + y * pitch();
      for (int64_t i = 0; i < width; ++i) total += double(row[i]);
    }
    return total;
  }
  // f(row of columns) for every row of a sample
  template <typename F>
  void rows_of(int64_t sample, F&& f) const {
    for (int64_t y = 0; y < height; ++y) f(first(sample) + y * pitch());
  }
};

}  // namespace block
}  // namespace genkernels
