// Tensors that are dense but not contiguous: copies their elements, in logical order, to and from contiguous memory.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace zo {

struct Dim {
  int64_t size, dst, src;  // strides, in elements
};

// The dimensions of an entry, the last one first, merged where possible; empty for an entry that is contiguous.
using Layout = std::vector<Dim>;

constexpr int64_t kTileRows = 8, kTileColumns = 16;  // transposed together; a larger tile would not stay in a cache
constexpr int64_t kRows = 64;  // of a chunk, at least, so that a transposition uses whole cache lines

// Copies `rows` rows of `columns` elements between two sets of strides, as integers, so that no bits change.
template <typename T>
void copy_plane(T* to, int64_t to_row, int64_t to_column, const T* from, int64_t from_row, int64_t from_column,
                int64_t rows, int64_t columns) {
  for (int64_t c = 0; c < columns; c += kTileColumns) {
    const int64_t width = std::min(kTileColumns, columns - c);
    for (int64_t r = 0; r < rows; r += kTileRows) {
      const int64_t height = std::min(kTileRows, rows - r);
      T* const t = to + r * to_row + c * to_column;
      const T* const f = from + r * from_row + c * from_column;
      if (to_row < to_column)  // so that writes go forward in memory
        for (int64_t j = 0; j < width; ++j)
          for (int64_t i = 0; i < height; ++i) t[i * to_row + j * to_column] = f[i * from_row + j * from_column];
      else
        for (int64_t i = 0; i < height; ++i)
          for (int64_t j = 0; j < width; ++j) t[i * to_row + j * to_column] = f[i * from_row + j * from_column];
    }
  }
}

// Copies elements begin .. end - 1 of a strided tensor to contiguous memory (flat, which starts at element begin), or
// back: the const side is the source.
template <typename Tensor, typename Flat>
void copy_range(const Layout& dims, int64_t Dim::* stride, Tensor* tensor, Flat* flat, int64_t begin, int64_t end) {
  const Dim column = dims[0], row = dims.size() > 1 ? dims[1] : Dim{1, 0, 0};
  while (begin < end) {
    int64_t rest = begin;
    Tensor* at = tensor;
    for (const Dim& dim : dims) {
      at += rest % dim.size * (dim.*stride);
      rest /= dim.size;
    }
    const int64_t first = begin % column.size, below = row.size - begin / column.size % row.size, left = end - begin;
    int64_t rows = 1, columns = std::min(column.size - first, left);
    if (first == 0 && left >= column.size) rows = std::min(below, left / column.size);
    if constexpr (std::is_const_v<Tensor>)
      copy_plane(flat, columns, 1, at, row.*stride, column.*stride, rows, columns);
    else
      copy_plane(at, row.*stride, column.*stride, flat, columns, 1, rows, columns);
    flat += rows * columns;
    begin += rows * columns;
  }
}

}  // namespace zo
